"""Writes a trained model: for other tools, or as a bundle that recommends on its own.

    python -m sdpo_jax.export --workdir=runs/lastfm/run --stage=sdpo --format=peft --output=DIR
    python -m sdpo_jax.export --workdir=runs/lastfm/run --stage=sdpo --format=merged --output=DIR

`peft`, the adapter, loads in peft and transformers on top of the base model; `merged` is a whole
model in bfloat16, which also `--stage=base` can be. Both get the tokenizer and a model card.
`bundle` has the weights, the catalogue and the prompts: all that `sdpo recommend` and `sdpo serve`
need. With `--weights=adapter` it has the adapter alone and needs the converted base beside it.
`--push=user/name` also sends the folder to the Hugging Face Hub.
"""

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sdpo_jax.data import prompts
from sdpo_jax.data.prepared import Dataset
from sdpo_jax.data.tokens import new_tokens
from sdpo_jax.models.base_weights import read_weights
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.peft import write_adapter
from sdpo_jax.models.store import read_meta, write_model
from sdpo_jax.models.tokenizer import ends_of, load_tokenizer
from sdpo_jax.models.weights import TOKENIZER_FILES, WHOLE, abstract_base, slots
from sdpo_jax.reports.model_card import model_card
from sdpo_jax.runs.checkpoints import CheckpointGone
from sdpo_jax.runs.config import DTYPES
from sdpo_jax.runs.inputs import adapter_config, inputs_of
from sdpo_jax.runs.steps import choose_step, raw_adapter
from sdpo_jax.runs.workdir import Run, read_run
from sdpo_jax.serving.sources import Settings, write_bundle
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import check_room, is_free, read_object, whole_folder
from sdpo_jax.system.hub import check_push, name_and_revision, push

FORMATS = ("peft", "merged", "bundle")
WEIGHTS = ("merged", "adapter")  # of a bundle
SHARD = "5GB"


def export(
    workdir: str | Path,
    stage: str,
    form: str,
    output: str | Path,
    step: int | None = None,
    weights: str = "merged",
    dtype: str | None = None,
) -> Path:
    """Writes the folder `output` atomically, and returns it.

    `dtype` is that of an adapter alone (None: float32); whole models are in bfloat16. `step`
    defaults to the stage's best. Raises InputError if the run, the stage, the step, the data or the
    model is not there, and if `output` is not empty.
    """
    run, output = read_run(Path(workdir)), Path(output).absolute()
    alone = form == "peft" or (form == "bundle" and weights == "adapter")
    check_export(run, stage, output, alone)
    if dtype and not alone:
        raise InputError("--dtype: found it with a whole model, which is in bfloat16: leave it out")
    step = choose_step(run, stage, step)
    inputs = inputs_of(run, run.config.validation_split)
    card = model_card(run, inputs.dataset.meta, stage, step, form)
    model = Path(run.config.model)
    config = DecoderConfig.read(model)
    try:
        tree = {"layers": {}} if stage == "base" else raw_adapter(run, stage, step)
        with whole_folder(output) as partial:
            (partial / "README.md").write_text(card, encoding="utf-8")
            lora = adapter_config(run.config)
            part = partial
            if form == "bundle":
                part = partial / ("adapter" if alone else "model")
                part.mkdir()
            if alone:
                source = name_and_revision(read_meta(model)["source"])
                write_adapter(part, tree, lora, config, *source, dtype=np.dtype(dtype or "float32"))
            elif form == "merged":
                write_merged(part, model, tree, lora, config)
            else:
                write_converted(part, model, tree, lora, config)
            if form == "bundle":
                write_bundle_of(partial, run, inputs.dataset, stage, model if alone else part)
            else:
                copy_tokenizer(model, partial)
                write_ends(partial, model, run.config.prompt, inputs.dataset.titles.values())
    except CheckpointGone as error:
        raise InputError(f"{error}: found no readable checkpoint: give another --step") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output}: {error}: free space or give another --output") from error
    return output


def check_export(run: Run, stage: str, output: Path, alone: bool) -> None:
    """Raises InputError for a run or stage that cannot be exported; `alone`: as an adapter."""
    known = (*run.config.stages, *([] if alone else ["base"]))
    if stage not in known:
        raise InputError(f"--stage: found {stage!r}, expected {', '.join(known)}")
    if alone and run.config.tune == "full":
        raise InputError(
            f"{run.path}: found a run that trained all weights (config.tune=full), expected one "
            "with an adapter: export it with --format=merged"
        )
    if run.config.item_vectors:
        raise InputError(
            f"{run.path}: found a run whose prompts hold item vectors (config.item_vectors), "
            "expected one whose prompts are text: other tools cannot feed them"
        )
    if not is_free(output):
        raise InputError(f"--output: found something in {output}, expected a new folder")


def copy_tokenizer(model: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (model / name).exists():
            shutil.copy(model / name, folder)


def write_converted(
    folder: Path, model: Path, tree: dict, lora: LoraConfig, config: DecoderConfig
) -> None:
    """Base plus adapter as a converted model, in bfloat16; arguments as `write_merged`."""
    copy_tokenizer(model, folder)
    shutil.copy(model / "config.json", folder)
    merged = unflatten_dict(dict(merged_stacks(model, tree, lora, config)), sep="/")
    base = read_meta(model)
    meta = {"source": base["source"], "family": base["family"], "dtype": "bfloat16"}
    write_model(folder, merged, meta)


def write_bundle_of(folder: Path, run: Run, dataset: Dataset, stage: str, model: Path) -> None:
    """The catalogue and the prompts of a run; `model`: the converted weights."""
    c = run.config
    settings = Settings(run.templates, c.prompt, c.history, c.max_length, c.seed)
    digest = read_meta(model)["sha256"]
    write_bundle(folder, dataset, settings, stage, digest, dtype=c.dtype, base_dtype=c.base_dtype)


def write_merged(
    folder: Path, model: Path, tree: dict, lora: LoraConfig, config: DecoderConfig
) -> None:
    """Base plus adapter in bfloat16 shards; each is written as soon as its last tensor is made.

    Args:
      folder: where to; it exists.
      model: the converted base.
      tree: {"layers": {"q": {"a": [L, in, R], "b": [L, R, out]}, …}}, or all trained weights;
        {"layers": {}} is the base.
      lora: its rank and alpha.
      config: of the decoder.
    """
    content = read_object(model / "config.json", WHOLE)
    content.pop("torch_dtype", None)
    content["dtype"] = "bfloat16"
    _write_json(folder / "config.json", content)
    plan = shard_plan(config)
    check_room(folder, plan.metadata["total_size"])
    shard_of = plan.tensor_to_filename
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in merged_tensors(model, tree, lora, config):
        shard = waiting.setdefault(shard_of[name], {})
        shard[name] = tensor
        if len(shard) == len(plan.filename_to_tensors[shard_of[name]]):
            save_file(waiting.pop(shard_of[name]), folder / shard_of[name], {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": shard_of}
        _write_json(folder / "model.safetensors.index.json", index)


def write_ends(folder: Path, model: Path, prompt: str, titles: Iterable[str]) -> None:
    """Writes generation_config.json: the ends of an answer, its greatest length, no sampling.

    The trained end comes first: EOS, or the line break of a history. The ends are also written
    into config.json, if there is one.
    """
    tokenizer = load_tokenizer(model)
    ends = (prompts.answer_end(tokenizer, prompt), *ends_of(model, tokenizer))
    ends = {"eos_token_id": [*dict.fromkeys(ends)]}
    content = ends | {"do_sample": False, "max_new_tokens": new_tokens(titles, tokenizer)}
    if os.path.exists(folder / "config.json"):
        _write_json(folder / "config.json", read_object(folder / "config.json", WHOLE) | ends)
    _write_json(folder / "generation_config.json", content)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def shard_plan(config: DecoderConfig):
    """The file of each tensor, in the order in which `merged_tensors` makes them."""
    shapes = abstract_base(config)
    order = list(shapes)
    table = sorted(slots(config).items(), key=lambda item: order.index(item[1].path))
    sizes = {
        name: 2 * int(np.prod(shapes[slot.path].shape[0 if slot.layer is None else 1 :]))
        for name, slot in table
    }
    return split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda n: n,
        max_shard_size=SHARD,
        filename_pattern="model{suffix}.safetensors",
    )


def merged_tensors(model: Path, tree: dict, lora: LoraConfig, config: DecoderConfig):
    """Yields (Hugging Face's name, tensor in bfloat16), array by array."""
    by_path: dict[str, list] = {}
    for name, slot in slots(config).items():
        by_path.setdefault(slot.path, []).append((name, slot))
    for path, stack in merged_stacks(model, tree, lora, config):
        for name, slot in by_path[path]:
            tensor = stack if slot.layer is None else stack[slot.layer]
            yield name, np.ascontiguousarray(tensor.T if slot.transposed else tensor)


def merged_stacks(model: Path, tree: dict, lora: LoraConfig, config: DecoderConfig):
    """Yields (path, array of all layers) of `W + alpha/R A B` in bfloat16."""
    stored, device = read_meta(model)["dtype"], jax.local_devices(backend="cpu")[0]
    place = jax.sharding.SingleDeviceSharding(device)
    shapes = {
        path: jax.ShapeDtypeStruct(leaf.shape, stored, sharding=place)
        for path, leaf in abstract_base(config).items()
    }
    weights = read_weights(model / "weights", unflatten_dict(shapes, sep="/"))
    if lora.full and tree["layers"]:
        weights = flatten_dict(tree, sep="/").items()
    for path, stack in weights:
        host, adapter = np.asarray(stack), {}
        if path.endswith("/kernel"):
            adapter = tree["layers"].get(path.split("/")[1], {})
        merged = np.empty(host.shape, ml_dtypes.bfloat16)
        if adapter and not lora.full:
            for layer, (a, b) in enumerate(zip(adapter["a"], adapter["b"], strict=True)):
                change = lora.scale * (np.asarray(a) @ np.asarray(b))
                merged[layer] = host[layer].astype(np.float32) + change
        else:
            merged[...] = host
        yield path, merged
        del stack, host  # before the next is read


def report(output: Path, form: str) -> str:
    """A line about the folder, and how to load it."""
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    written = f"{output}: {form}, {size / 1e6:,.1f} MB, with a model card that has the prompt"
    if form == "bundle":
        base = "" if (output / "model").is_dir() else " --model=CONVERTED_BASE"
        return f"{written}\nnext: python -m sdpo_jax.recommend --bundle={output}{base} --history=…"
    if form == "merged":
        return f"{written}\nnext: vllm serve {output}"
    adapter = read_object(output / "adapter_config.json", "expected what export wrote")
    if adapter["base_model_name_or_path"].endswith(".gguf"):
        return (
            f"{written}\nits base is a .gguf file, which peft cannot load: export it too, with "
            "--stage=base --format=merged, and name that folder in adapter_config.json"
        )
    return f"{written}\nnext: peft.AutoPeftModelForCausalLM.from_pretrained({str(output)!r})"


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    if args.push:
        check_push(args.push)
    output = export(
        args.workdir,
        args.stage,
        args.format,
        args.output,
        args.step,
        args.weights,
        args.dtype,
    )
    print(report(output, args.format))
    if args.push:
        print(f"sent to {push(output, args.push)}, which is private if it is new")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_string("stage", "sdpo", "sft or sdpo")
    flags.DEFINE_enum("format", "peft", FORMATS, "adapter alone, whole model, or bundle")
    flags.DEFINE_enum("weights", "merged", WEIGHTS, "of a bundle")
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_enum("dtype", None, DTYPES, "of an adapter alone; default: float32")
    flags.DEFINE_string("push", "", "also send it to this repository of the Hub, user/name")
    flags.DEFINE_integer("step", None, "checkpoint of the stage; default: the best", lower_bound=0)
    run_command(main)
