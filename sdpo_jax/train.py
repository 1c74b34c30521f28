"""Trains a recommender: SFT, then the reference's log-probs, then S-DPO.

python -m sdpo_jax.train --config=configs/lastfm.py --workdir=runs/lastfm/run

Any key of the config can be given as --config.key=value. The same command resumes a stopped run.
Several processes that run it are one training: see launch/; Slurm and Open MPI need no flag.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags

from sdpo_jax.data import thoughts
from sdpo_jax.data.negatives import Negatives
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.data.segments import units
from sdpo_jax.data.tokens import Encoder, Example, check_titles, new_tokens
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.peft import read_adapter
from sdpo_jax.models.store import Model, with_adapter
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.runs import workdir
from sdpo_jax.runs.config import RunConfig, explained, keys
from sdpo_jax.runs.inputs import adapter_config, open_inputs
from sdpo_jax.runs.trackers import check_tracker
from sdpo_jax.system import sharding
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import (
    Interrupted,
    StopSignal,
    first_process,
    join_processes,
    set_up_jax,
)
from sdpo_jax.system.topologies import EXPECTED, open_topology
from sdpo_jax.training import step_memory
from sdpo_jax.training.inference import Inference
from sdpo_jax.training.order import Key, encode
from sdpo_jax.training.stage import Stage

EXPLAINED = 512  # evenly spaced training examples, of which --explain takes the longest


def train(config: RunConfig, run: Path, stop: StopSignal, experiment: str = "") -> None:
    """Trains all stages of `config` in the folder `run`.

    `experiment` is the config file's name, for messages. Raises Interrupted after a signal.
    """
    check_folders(config, experiment)
    set_up_jax(config.dtype)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    check_batch(config, sharding.data_shards(mesh))
    check_tracker(config.tracker)

    inputs = open_inputs(config, workdir.stored_templates(run))
    dataset = inputs.dataset
    check_dataset(config, dataset)
    model = inputs.model(mesh, config.remat)
    check_length(config, model.config, new_tokens(dataset.titles.values(), model.tokenizer))
    lora = first_adapter(config, model)
    encoder = inputs.encoder(model.tokenizer, model.config.V)
    check_titles(dataset.titles, model.tokenizer)
    inference = Inference(model, config.batch_layout, mesh, config.microbatch)
    stages = [
        Stage(name, config, run, model, encoder, mesh, inference, stop) for name in config.stages
    ]

    # All checks have passed: from here on files are written.
    started = workdir.Run(run, config, inputs.fingerprints(), inputs.wordings, inputs.templates)
    with contextlib.ExitStack() as lock:

        def open_run() -> None:
            workdir.check_run(started)  # before a lock is written
            lock.enter_context(workdir.locked(run))
            workdir.open_run(started)

        first_process(open_run)
        announce(config, run, model, encoder)
        for stage in stages:
            lora = stage.run(lora)
    base = [] if config.item_vectors else ["base"]  # which cannot read them
    print(
        f"next: python -m sdpo_jax.evaluate --workdir={run} "
        f"--stage={','.join([*base, *config.stages])} --decoder=greedy,score\n"
        f"      python -m sdpo_jax.report --workdir={run}"
    )


def explain(config: RunConfig, experiment: str = "", topology: str = "") -> None:
    """Prints the memory per device of a step, by remat and microbatch, and which to use.

    `topology`: devices to compile for that need not be here, see `open_topology`; "" for those
    that are.
    """
    check_folders(config, experiment)
    devices = limit = None
    if topology:
        found = open_topology(topology)
        devices, limit = found.devices, found.limit
    set_up_jax(config.dtype)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    limit = limit or step_memory.limit_of(jax.local_devices()[0])
    longest, count = longest_examples(config)
    print(
        f"GiB per device, of which there are {limit / 2**30:.1f}; K={count}, the longest of "
        f"{len(longest)} examples, dtype={config.dtype}; devices: {mesh.devices.size} of kind "
        f"{mesh.devices.flat[0].device_kind}"
    )
    remat, microbatch = step_memory.fastest_fitting(
        DecoderConfig.read(Path(config.model)),
        adapter_config(config),
        longest,
        batch_size=config.batch_size,
        limit=limit,
        dtype=config.dtype,
        base_dtype=config.base_dtype,
        layout=config.batch_layout,
        mesh=mesh,
    )
    print(f"probably fastest: --config.remat={remat} --config.microbatch={microbatch}")


def longest_examples(config: RunConfig) -> tuple[list[Example], int]:
    """The training examples of a run, or EXPLAINED of them, the longest first; and their K."""
    inputs = open_inputs(config)
    dataset = inputs.dataset
    check_dataset(config, dataset)
    folder = Path(config.model)
    decoder = DecoderConfig.read(folder)
    encoder = inputs.encoder(load_tokenizer(folder), decoder.V)
    of_train = units(encoder, "train", config.segment)
    count = config.num_negatives if "sdpo" in config.stages else 0
    vectors = encoder.first_vector is not None
    keys = [Key(unit, vectors) for unit in evenly_spaced(len(of_train), EXPLAINED)]
    negatives = Negatives(dataset, config.negatives, config.seed, config.popularity_power)
    made = encode(encoder, "train", of_train, keys, negatives, count)
    return sorted(made.values(), key=lambda e: -e.tokens), count


def first_adapter(config: RunConfig, model: Model):
    """The adapter that the first stage starts from: a fresh one, or `config.lora.init_from`."""
    if not config.lora.init_from:
        return model.lora
    folder = Path(config.lora.init_from)
    return with_adapter(model, read_adapter(folder, adapter_config(config), model.config))


def check_folders(config: RunConfig, experiment: str) -> None:
    """Says in one line which commands make what is missing."""
    name = {"lastfm": "lastfm", "movielens": "movielens", "quickstart": "movielens"}.get(
        experiment, "NAME"
    )
    # MovieLens-100K and the quickstart's model are in packages, so they need no path.
    source = "" if name == "movielens" else "--source=PATH "
    model = "" if Path(config.model).parts[-2:] == ("quickstart", "model") else "--model=PATH "
    prepare = f"python -m sdpo_jax.prepare --dataset={name} {source}--output={config.dataset}"
    convert = f"python -m sdpo_jax.convert {model}--output={config.model}"
    missing = [
        f"`{command}`"
        for file, command in (
            (Path(config.dataset, "dataset.json"), prepare),
            (Path(config.model, "model.json"), convert),
        )
        if not os.path.isfile(file)
    ]
    if missing:
        raise InputError(f"nothing to train on yet: first run {' and '.join(missing)}")


def check_batch(config: RunConfig, shards: int) -> None:
    """The global batch is what is configured; how it is cut must come out even."""
    whole = config.microbatch * shards
    if config.batch_size % whole:
        raise InputError(
            f"batch_size={config.batch_size} does not divide into microbatch={config.microbatch} "
            f"on {shards} data shards: set --config.batch_size to a multiple of {whole}, or "
            "--config.microbatch to a divisor"
        )


def check_length(config: RunConfig, decoder: DecoderConfig, answer: int) -> None:
    """A prompt with its answer must be within the positions that the model was made for.

    RoPE of kind `dynamic` changes with the longest text of a batch beyond the length that it
    stretches from, so there what evaluation generates after a prompt, up to `answer` tokens, is
    within that length too.
    """
    if decoder.positions is not None and config.max_length > decoder.positions:
        raise InputError(
            f"config.max_length is {config.max_length}, {config.model} has {decoder.positions} "
            f"positions: set --config.max_length={decoder.positions} or less"
        )
    room = decoder.rope.positions - answer
    if decoder.rope.kind == "dynamic" and config.max_length > room:
        raise InputError(
            f"config.max_length is {config.max_length}, this model's dynamic RoPE is the same for "
            f"all texts up to {decoder.rope.positions} tokens: set --config.max_length={room}"
        )


def check_dataset(config: RunConfig, dataset) -> None:
    """The data set has the split to validate on and enough candidates to draw from."""
    splits = [name for name in dataset.splits if name.startswith("val")]
    if config.validation_split not in splits:
        raise InputError(
            f"config.validation_split is {config.validation_split!r}, {config.dataset} has "
            f"{', '.join(splits)}: choose one of them (the best step must not be one of the test's)"
        )
    shown = len(dataset.splits["train"][0].candidates)
    if config.negatives == "shown" and config.num_negatives > shown - 1:
        raise InputError(
            f"config.num_negatives is {config.num_negatives}, {config.dataset} shows {shown} "
            f"candidates: at most {shown - 1}, or set --config.negatives to draw from all items"
        )


def announce(config: RunConfig, run: Path, model, encoder: Encoder) -> None:
    """Prints the run: config, sizes, devices, and one example as the model reads it."""
    count = sum(x.size for x in jax.tree.leaves(model.lora))
    targets = adapter_config(config).on(model.config.projections).targets
    trained = f"frozen, {config.base_stored}), LoRA {count:,} on {', '.join(targets)}"
    if config.tune == "full":
        trained = "all trained)"
    print("\n".join(f"{name}: {value!r}" for name, _, value in keys(config)))
    print(
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) in {jax.process_count()} "
        f"process(es), {jax.local_device_count()} of them in this; {model.meta['family']} base "
        f"of {model.meta['parameters']:,} parameters ({trained}; run in {run}"
    )
    if message := encoder.truncation():
        print(message)
    if mark := thoughts.opened(encoder.templates[0]):
        print(
            f"warning: prompts end inside a thought ({mark}), so answers are trained as thoughts "
            "and judged as they are: see --config.chat_options"
        )
    if config.stages[0] == "sdpo":
        start = config.lora.init_from or "the base model"
        print(f"this run has no SFT stage: S-DPO starts from {start} and refers to it")
    if encoder.first_vector is not None:
        print(f"the vectors of {config.item_vectors} follow the titles in the prompts")
    rows = units(encoder, "train", config.segment)[0]
    titles = [encoder.dataset.titles[encoder.window("train", row).target] for row in rows]
    end = "\n" if config.prompt == "history" else "<eos>"
    print(
        f"\n--- train example 0, {len(rows)} target(s) ---\n{encoder.prompt_text('train', 0)}"
        f"{''.join(title + end for title in titles)}\n---\n"
    )


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    file = config_flags.get_config_filename(args["config"])
    try:
        args.config.keys()  # ml_collections reports a file it could not load only when used
    except OSError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"--config={file}: cannot be loaded ({reason}), expected a config file, as in configs/"
        ) from error
    config = RunConfig.of(args.config.to_dict())
    experiment = Path(file).name.partition(".py")[0]
    run = Path(args.workdir or f"runs/{experiment}/run")
    if args.help_config:
        print(explained(config))
        return
    if args.topology and not args.explain:
        raise InputError(
            "--topology: found it without --explain, expected both: nothing trains there"
        )
    if args.explain:
        explain(config, experiment, args.topology)
        return
    join_processes(
        args.coordinator, args.processes, args.process, **dataclasses.asdict(config.distributed)
    )
    try:
        train(config, run, StopSignal(), experiment)
    except Interrupted:
        print(f"stopped and saved in {run}: the same command resumes from there")
        sys.exit(os.EX_TEMPFAIL)  # for schedulers: not finished, start again


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "config file, with :argument", lock_config=True)
    flags.DEFINE_string("workdir", None, "folder of the run (default: runs/<config's name>/run)")
    flags.DEFINE_string("coordinator", "", "host:port of process 0; auto: JAX asks the cluster")
    flags.DEFINE_integer("processes", None, "number of processes of the run", lower_bound=1)
    flags.DEFINE_integer("process", None, "number of this process, from 0", lower_bound=0)
    flags.DEFINE_bool("explain", False, "only print the memory of a step per device")
    flags.DEFINE_string(
        "topology", "", f"with --explain: compile for these devices instead, such as {EXPECTED}"
    )
    flags.DEFINE_bool("help_config", False, "only print the keys, their values and meaning")
    flags.mark_flag_as_required("config")
    run_command(main)
