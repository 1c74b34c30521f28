"""The train command on a tiny model: stages, resuming, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sdpo_jax.errors import InputError
from sdpo_jax.train import train
from sdpo_jax.training.checkpoint import Checkpoints
from sdpo_jax.training.metrics import read_metrics
from sdpo_jax.training.stage import Interrupted, Stage

ROOT = Path(__file__).parents[1]
STEPS = 12


@pytest.fixture(scope="module")
def command(dataset_folder, model_folder):
    def make(run: Path, **changes) -> list[str]:
        keys = {
            "dataset": dataset_folder, "model": model_folder, "dtype": "float32",
            "remat": "none", "batch_size": 4, "microbatch": 2, "lora.dropout": 0.1,
            "sft.epochs": 1, "sft.max_steps": STEPS, "sft.learning_rate": 0.01,
            "sdpo.epochs": 1, "sdpo.max_steps": STEPS, "sdpo.learning_rate": 0.01,
            "eval_every": 6, "checkpoint_every": 2, "validation_windows": 6,
        } | changes  # fmt: skip
        return [
            sys.executable, "-m", "sdpo_jax.train", "--config=configs/movielens.py",
            f"--workdir={run}", *(f"--config.{k}={v}" for k, v in keys.items()),
        ]  # fmt: skip

    return make


def environment() -> dict[str, str]:
    """One device: a process that is killed should not have seven idle ones."""
    return os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(process: subprocess.Popen, run: Path, stage: str, step: int) -> None:
    """Returns when metrics.jsonl shows `step` of `stage`."""
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        if any(m["stage"] == stage and m["step"] >= step for m in read_metrics(run / "metrics")):
            return
        time.sleep(0.02)
    raise AssertionError(f"{stage} {step} never came: {process.communicate()[0]}")


def final_adapters(run: Path) -> dict[str, list[np.ndarray]]:
    """LoRA arrays of each stage's last step, as stored."""
    out = {}
    for stage in ("sft", "sdpo"):
        checkpoints = Checkpoints(run / stage, read_only=True)
        stored = checkpoints.restore_raw(STEPS)
        out[stage] = [np.asarray(x) for x in jax.tree.leaves(stored)]
        checkpoints.close()
    return out


@pytest.fixture(scope="module")
def unbroken(command, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return run, finish(start(command(run)))


def assert_same(run: Path, other: Path) -> None:
    found, expected = final_adapters(run), final_adapters(other)
    for stage in expected:
        for a, b in zip(found[stage], expected[stage], strict=True):
            np.testing.assert_array_equal(a, b)


def test_one_command_runs_both_stages_and_learns(unbroken):
    run, output = unbroken
    stages = {name: json.loads((run / "stages" / f"{name}.json").read_text()) for name in
              ("sft", "sdpo")}  # fmt: skip
    curve = read_metrics(run / "metrics")
    first = {m["stage"]: m["validation/loss"] for m in reversed(curve) if "validation/loss" in m}
    assert first["sdpo"] == pytest.approx(np.log(4), rel=1e-4)
    assert stages["sft"]["validation_loss"] < first["sft"]
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
            "logps/chosen", "logps/rejected", "loss", "grad_norm"} <= set(curve[-2])  # fmt: skip
    assert list((run / "metrics").glob("sdpo/events.*"))
    assert "--- train example 0 ---" in output
    assert "sdpo_jax.evaluate" in output.splitlines()[-2]


def test_the_steps_in_the_metrics_are_each_there_once(unbroken):
    run, _ = unbroken
    steps = [
        m["step"] for m in read_metrics(run / "metrics") if m["stage"] == "sft" and "loss" in m
    ]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stage", ["sft", "sdpo"])
def test_a_run_killed_in_a_stage_and_started_again_ends_bit_equal(
    stage, command, unbroken, tmp_path
):
    run = tmp_path / "run"
    process = start(command(run))
    wait_for(process, run, stage, 5)
    process.kill()
    process.communicate()
    assert not (run / "stages" / f"{stage}.json").exists()
    finish(start(command(run)))
    assert_same(run, unbroken[0])
    steps = [
        m["step"] for m in read_metrics(run / "metrics") if m["stage"] == stage and "loss" in m
    ]
    assert steps == list(range(1, STEPS + 1))


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_weights(
    command, unbroken, tmp_path
):
    run = tmp_path / "run"
    process = start(command(run, checkpoint_every=1000))
    wait_for(process, run, "sft", 3)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert "the same command goes on" in output
    assert "Traceback" not in output
    stopped = Checkpoints(run / "sft", read_only=True)
    assert 3 <= stopped.steps()[-1] < STEPS
    stopped.close()
    finish(start(command(run, checkpoint_every=1000)))
    assert_same(run, unbroken[0])


def test_a_signal_in_the_last_validation_does_not_lose_it(config, tmp_path, monkeypatch):
    config.stages = ("sft",)
    config.sft.max_steps, config.eval_every, config.checkpoint_every = 3, 2, 2
    validate = Stage.validate

    def interrupted(stage, state, references):
        if int(state.step) == stage.steps:
            raise Interrupted
        return validate(stage, state, references)

    stop = SimpleNamespace(received=False, check=lambda: None)
    monkeypatch.setattr(Stage, "validate", interrupted)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", stop)
    monkeypatch.undo()
    train(config, tmp_path / "run", stop)
    checkpoints = Checkpoints(tmp_path / "run" / "sft", read_only=True)
    assert 3 in checkpoints.losses()
    checkpoints.close()


def test_a_validation_loss_that_is_no_number_stops_the_run_unsaved(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "validate", lambda *_: {"loss": np.nan, "windows": 1})
    with pytest.raises(InputError, match="sft step 0: the validation loss is nan"):
        train(config, tmp_path / "run", SimpleNamespace(received=False, check=lambda: None))
    checkpoints = Checkpoints(tmp_path / "run" / "sft", read_only=True)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_a_finished_run_started_again_changes_nothing(command, unbroken):
    run, _ = unbroken
    before = {p: p.stat().st_mtime_ns for p in (run / "sdpo").rglob("*") if p.is_file()}
    output = finish(start(command(run)))
    assert output.count("(the best)") == 2
    assert before == {p: p.stat().st_mtime_ns for p in (run / "sdpo").rglob("*") if p.is_file()}


def test_another_config_on_the_same_workdir_is_refused_with_the_keys(command, unbroken):
    done = subprocess.run(
        command(unbroken[0], beta=0.5, batch_size=8), cwd=ROOT, env=environment(),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "beta was 1.0, now 0.5" in done.stderr
    assert "batch_size was 4, now 8" in done.stderr


def test_the_reference_is_stored_in_float32_for_every_candidate(unbroken):
    stored = np.load(unbroken[0] / "reference" / "train.npz")
    assert stored["logp_NC"].dtype == np.float32
    assert stored["logp_NC"].shape == (STEPS * 4, 4)
