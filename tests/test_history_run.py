"""Whole runs whose prompts are histories, and of which all weights can be trained."""

import gc
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trainers
from conftest import tiny_config
from flax import nnx
from test_decoder_parity import all_logits
from trainers import NEVER, train

from sdpo_jax.convert import convert
from sdpo_jax.data.loader import choose_shapes, collate
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.evaluate import evaluate
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.export import export
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.objectives.logprobs import padded_logp
from sdpo_jax.runs.curves import read_metrics
from sdpo_jax.runs.inputs import adapter_config
from sdpo_jax.runs.steps import adapter, choose_step
from sdpo_jax.runs.workdir import read_run, stage_result
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import Interrupted
from sdpo_jax.training.stage import Stage

pytestmark = pytest.mark.usefixtures("kept_compilations")
STEPS = 12


@pytest.fixture(scope="module")
def data(histories_folder) -> Path:
    return histories_folder


@pytest.fixture(scope="module")
def flags(data, model_folder):
    def make(run: Path, **changes) -> list[str]:
        changes = {"checkpoint_every": 1} | changes
        return trainers.history_flags(run, data, model_folder, STEPS, **changes)

    return make


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    """One process with one device that is never stopped."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return run, trainers.end(trainers.start(flags(run)))


def test_one_command_trains_both_stages(unbroken, data):
    run, output = unbroken
    lines = read_metrics(run / "metrics")
    found = {s: [m for m in lines if m["stage"] == s] for s in ("sft", "sdpo")}
    of_validation = {s: [m for m in of if "validation/loss" in m] for s, of in found.items()}
    assert of_validation["sdpo"][0]["validation/loss"] == pytest.approx(np.log(4), rel=1e-4)
    assert of_validation["sft"][-1]["validation/loss"] < of_validation["sft"][0]["validation/loss"]
    assert "--- train example 0, 3 target(s) ---" in output
    targets = [m["targets"] for m in found["sdpo"] if "targets" in m]
    assert len(set(targets)) > 1 and min(targets) > 8, "examples have several targets"


def test_each_epoch_has_negatives_of_its_own(unbroken, data):
    """The reference has log-probs of every drawn negative; SFT draws none."""
    with np.load(unbroken[0] / "reference" / "train.npz") as stored:
        logp_XC = stored["logp"]
    windows = len(read_dataset(data, ["train"]).splits["train"])
    targets = sum(
        m["targets"]
        for m in read_metrics(unbroken[0] / "metrics")
        if m["stage"] == "sdpo" and "targets" in m
    )
    assert len(logp_XC) == targets > windows
    assert len(np.unique(logp_XC[:, 1:])) > 0.5 * logp_XC[:, 1:].size
    assert len(np.unique(logp_XC[:, 0])) < windows + 10  # a target's does not depend on the draw


def test_it_is_evaluated_with_every_decoder(unbroken):
    run, _ = unbroken
    summaries = evaluate(run, ["base", "sft", "sdpo"], decoders=["score", "trie", "greedy"])
    assert len(summaries) == 9 and {summary["n"] for summary in summaries} == {4}
    evaluator = Evaluator(read_run(run), "test")
    step = stage_result(run, "sdpo")["best_step"]
    lora = adapter(read_run(run), "sdpo", step, evaluator.model.lora)
    found, _ = evaluator.run(lora, ["score", "greedy"])
    model = evaluator.model
    logp = jax.jit(lambda batch: padded_logp(nnx.merge(model.graphdef, lora, model.base), batch))
    for i, example in enumerate(evaluator.examples):
        assert example.prompt[-1] == evaluator.encoder.end == example.answers_MC[0][0][-1]
        expected = np.asarray(logp(collate([example], choose_shapes([[example]])[0])))[0, 0]
        scores = dict(found["score"][i]["ranked"])
        titles = [evaluator.dataset.titles[c] for c in evaluator.windows[i].candidates]
        np.testing.assert_allclose([scores[title] for title in titles], expected, atol=2e-3)
        assert "\n" not in found["greedy"][i]["generation"]


def test_killed_in_each_stage_it_goes_on_to_the_same_weights(flags, unbroken, tmp_path):
    run = tmp_path / "run"
    for stage in ("sft", "sdpo"):
        process = trainers.start(flags(run))
        trainers.wait_for_step(process, run, stage, 3)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert stage_result(run, stage) is None
    trainers.end(trainers.start(flags(run)))
    assert trainers.differences(run, unbroken[0], STEPS) == 0


def short(data, model_folder, **changes):
    """Four steps of each stage in this process, on its eight devices."""
    config = tiny_config(data, model_folder)
    config.prompt, config.segment, config.negatives, config.remat = "history", 4, "uniform", "none"
    config.sft.max_steps = config.sdpo.max_steps = 4
    config.sft.learning_rate = config.sdpo.learning_rate = 1e-3
    config.lora.dropout, config.checkpoint_every = 0.0, 1
    config.update(changes)
    return config


def test_hard_negatives_are_chosen_from_a_pool_that_the_reference_read(
    data, model_folder, tmp_path
):
    """Chosen again after a stop, they are the same ones."""
    config = short(data, model_folder, negatives="hard", hard_pool=8, stages=("sdpo",))
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(config, run, stops_after(7))
    assert 0 < len(trainers.curve(run, "sdpo")) < 4
    train(config, run, NEVER)
    losses = trainers.curve(run, "sdpo")
    assert losses[0] == pytest.approx(np.log(4), abs=1e-5) and len(losses) == 4
    with np.load(run / "reference" / "train.npz") as stored:
        assert stored["logp"].shape[1] == 1 + 8


def stops_after(asks: int) -> SimpleNamespace:
    """A StopSignal that comes once it was asked so often."""
    left = iter([False] * asks)

    def check():
        if stop.received:
            raise Interrupted

    def ask():
        stop.received = stop.received or next(left, True)
        return stop.received

    stop = SimpleNamespace(received=False, ask=ask, check=check)
    return stop


@pytest.fixture(scope="module")
def full(data, model_folder, tmp_path_factory) -> Path:
    """A run that trained all weights."""
    run = tmp_path_factory.mktemp("full") / "run"
    train(short(data, model_folder, tune="full"), run, NEVER)
    return run


def decoder_of(run: Path, stage: str, step: int | None = None) -> nnx.Module:
    """At a step, or at the stage's best."""
    read = read_run(run)
    model = load_model(read.config.model, adapter_config(read.config), dtype="float32")
    step = choose_step(read, stage, step)
    return nnx.merge(model.graphdef, adapter(read, stage, step, model.lora), model.base)


def weights(decoder) -> dict:
    state = nnx.to_pure_dict(nnx.state(decoder))
    return {jax.tree_util.keystr(k): np.asarray(x) for k, x in jax.tree.leaves_with_path(state)}


def test_all_weights_are_trained_in_both_stages(full):
    base, sft = weights(decoder_of(full, "base")), weights(decoder_of(full, "sft"))
    sdpo = weights(decoder_of(full, "sdpo", step=4))
    assert sum(x.size for x in base.values()) == sum(x.size for x in sdpo.values())
    for name in base:
        assert (base[name] != sft[name]).any(), name
        assert (sft[name] != sdpo[name]).any(), name
    assert trainers.curve(full, "sdpo")[0] == pytest.approx(np.log(4), abs=1e-5)
    losses = trainers.curve(full, "sft")
    assert losses[-1] < losses[0] - 0.5


def test_all_weights_are_in_memory_once_beside_their_moments(
    data, model_folder, tmp_path, monkeypatch
):
    """As `memory` counts them."""
    copies, shape = [], (64, 32)  # of the embedding
    validate = Stage.validate

    def count() -> int:
        gc.collect()
        return sum(x.shape == shape for x in jax.live_arrays())

    def counted(stage, state, references):
        copies.append(count())
        return validate(stage, state, references)

    monkeypatch.setattr(Stage, "validate", counted)
    before = count()
    train(short(data, model_folder, tune="full"), tmp_path / "run", NEVER)
    assert {n - before for n in copies} == {3}


def test_a_full_run_is_evaluated(full):
    summaries = evaluate(full, ["base", "sdpo"], decoders=["score", "greedy"])
    assert [summary["n"] for summary in summaries] == [4] * 4


def test_an_interrupted_full_run_goes_on_to_the_same_weights(full, data, model_folder, tmp_path):
    config = short(data, model_folder, tune="full")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", stops_after(12))
    assert 0 < len(trainers.curve(tmp_path / "run", "sdpo")) < 4
    train(config, tmp_path / "run", NEVER)
    assert trainers.differences(tmp_path / "run", full, 4) == 0


def test_a_full_run_is_exported_as_a_whole_model_and_as_no_adapter(full, tmp_path):
    with pytest.raises(InputError, match=r"config\.tune=full.*--format=merged"):
        export(full, "sdpo", "peft", tmp_path / "out")
    folder = export(full, "sdpo", "merged", tmp_path / "out", step=4)
    convert(str(folder), str(tmp_path / "again"))
    again = load_model(tmp_path / "again", LoraConfig(rank=2), dtype="float32")
    trained = decoder_of(full, "sdpo", step=4)
    tokens = np.random.default_rng(0).integers(3, 60, (2, 9))
    mask = np.ones(tokens.shape, bool)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), nnx.split(trained)[1])
    expected = all_logits(nnx.merge(nnx.split(trained)[0], rounded), tokens, mask)
    found = all_logits(nnx.merge(again.graphdef, again.lora, again.base), tokens, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    untrained = all_logits(decoder_of(full, "base"), tokens, mask)
    assert np.abs(found - untrained).max() > 1e-2
