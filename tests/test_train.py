"""The train command on a tiny model: stages, resuming, refusals."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import trainers
from trainers import NEVER, train

from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.runs.curves import read_metrics
from sdpo_jax.runs.workdir import read_run
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import Interrupted
from sdpo_jax.training.stage import Stage

pytestmark = pytest.mark.usefixtures("kept_compilations")
STEPS = 12


@pytest.fixture(scope="module")
def flags(dataset_folder, model_folder):
    def make(run: Path, **changes) -> list[str]:
        return trainers.config_flags(run, dataset_folder, model_folder, STEPS, **changes)

    return make


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken") / "run"
    return run, trainers.end(trainers.start(flags(run)))


def test_one_command_runs_both_stages_and_learns(unbroken):
    run, output = unbroken
    stages = {
        name: json.loads((run / "stages" / f"{name}.json").read_text()) for name in ("sft", "sdpo")
    }
    curve = read_metrics(run / "metrics")
    first = {m["stage"]: m["validation/loss"] for m in reversed(curve) if "validation/loss" in m}
    assert first["sdpo"] == pytest.approx(np.log(4), rel=1e-4)
    assert stages["sft"]["validation_loss"] < first["sft"]
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "loss",
        "grad_norm",
    } <= set(curve[-2])
    assert list((run / "metrics").glob("sdpo/events.*"))
    assert "--- train example 0, 1 target(s) ---" in output
    assert "sdpo_jax.evaluate" in output.splitlines()[-2]


def test_the_metrics_tell_every_step_once_and_what_it_takes(unbroken):
    run, _ = unbroken
    assert len(trainers.curve(run, "sft")) == len(trainers.curve(run, "sdpo")) == STEPS
    line = read_metrics(run / "metrics")[-2]
    assert line["tokens_per_second_per_device"] > 0
    assert line["input_wait_seconds"] >= 0
    assert 0.01 < line["peak_memory_gib"] < 64
    assert "mfu" not in line  # a CPU's peak is not known


def test_sigterm_saves_and_the_same_command_goes_on_to_the_same_weights(flags, unbroken, tmp_path):
    run = tmp_path / "run"
    process = trainers.start(flags(run, checkpoint_every=1000))
    trainers.wait_for_step(process, run, "sft", 3)
    process.send_signal(signal.SIGTERM)
    output = trainers.end(process, expected=os.EX_TEMPFAIL)
    assert "the same command resumes" in output
    assert "Traceback" not in output
    stopped = Checkpoints(run / "sft", read_only=True)
    assert 3 <= stopped.steps()[-1] < STEPS
    stopped.close()
    trainers.end(trainers.start(flags(run, checkpoint_every=1000)))
    assert trainers.differences(run, unbroken[0], STEPS) == 0


def test_steps_are_traced_on_request(config, tmp_path):
    config.stages = ("sft",)
    config.sft.max_steps, config.profile_steps = 4, 1
    train(config, tmp_path / "run", NEVER)
    assert list((tmp_path / "run" / "profile" / "sft").rglob("*.xplane.pb"))


def test_a_signal_in_the_last_validation_does_not_lose_it(config, tmp_path, monkeypatch):
    config.stages = ("sft",)
    config.sft.max_steps, config.eval_every, config.checkpoint_every = 3, 2, 2
    validate = Stage.validate

    def interrupted(stage, state, references):
        if int(state.step) == stage.steps:
            raise Interrupted
        return validate(stage, state, references)

    monkeypatch.setattr(Stage, "validate", interrupted)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run", NEVER)
    monkeypatch.undo()
    train(config, tmp_path / "run", NEVER)
    checkpoints = Checkpoints(tmp_path / "run" / "sft", read_only=True)
    assert 3 in checkpoints.losses()
    checkpoints.close()


def test_the_pairwise_objective_trains_on_the_same_batch_from_log_2(config, tmp_path):
    config.objective, config.sdpo.max_steps, config.sdpo.learning_rate = "dpo_pairwise", 3, 1e-2
    train(config, tmp_path / "run", NEVER)
    losses = trainers.curve(tmp_path / "run", "sdpo")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[-1] < losses[0]


def test_a_validation_loss_that_is_no_number_stops_the_run_unsaved(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "validate", lambda *_: {"loss": np.nan, "windows": 1})
    with pytest.raises(InputError, match="sft step 0: the validation loss is nan"):
        train(config, tmp_path / "run", NEVER)
    checkpoints = Checkpoints(tmp_path / "run" / "sft", read_only=True)
    assert checkpoints.steps() == []
    checkpoints.close()


def test_a_finished_run_started_again_changes_nothing(flags, unbroken):
    run, _ = unbroken
    before = {p: p.stat().st_mtime_ns for p in (run / "sdpo").rglob("*") if p.is_file()}
    output = trainers.end(trainers.start(flags(run)))
    assert output.count("(the best)") == 2
    assert before == {p: p.stat().st_mtime_ns for p in (run / "sdpo").rglob("*") if p.is_file()}


def test_a_run_keeps_the_prompts_that_it_was_started_with(config, tmp_path, monkeypatch):
    """A chat format may write the day's date, and a prompt file may be edited."""
    config.stages, config.sft.max_steps = ("sft",), 2
    texts = ["Seen: [HistoryHere]. One of [CansHere]:", "Next of [CansHere] after [HistoryHere]:"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    config.prompt_file = str(tmp_path / "prompts.txt")
    day = "today is the 26th. "
    monkeypatch.setattr(
        "sdpo_jax.runs.inputs._in_chat", lambda _, found: tuple(day + t for t in found)
    )
    train(config, tmp_path / "run", NEVER)
    monkeypatch.setattr("sdpo_jax.runs.inputs._in_chat", lambda *_: pytest.fail("rendered again"))
    train(config, tmp_path / "run", NEVER)
    assert read_run(tmp_path / "run").templates == tuple(f"{day}{text} " for text in texts)
    (tmp_path / "prompts.txt").write_text("\n".join([texts[0], texts[1].replace("after", "to")]))
    with pytest.raises(InputError) as error:
        train(config, tmp_path / "run", NEVER)
    told = "prompt template 2 was …'CansHere] after [HistoryHere]: ', now …'CansHere] to [Hist"
    assert told in str(error.value)
    (tmp_path / "prompts.txt").write_text(texts[0])
    with pytest.raises(InputError, match="2 prompt templates, now 1"):
        train(config, tmp_path / "run", NEVER)


def test_another_config_on_the_same_workdir_is_refused_with_the_keys(flags, unbroken):
    output = trainers.end(trainers.start(flags(unbroken[0], beta=0.5, batch_size=8)), expected=2)
    assert "beta was 1.0, now 0.5" in output
    assert "batch_size was 4, now 8" in output


def test_the_reference_is_stored_in_float32_for_every_candidate(unbroken):
    stored = np.load(unbroken[0] / "reference" / "train.npz")
    assert stored["logp"].dtype == np.float32
    assert stored["logp"].shape == (48, 4)


@pytest.mark.parametrize("line", ['{"stage": "sft"', "[]", '{"stage": "sft", "step": "one"}'])
def test_a_line_of_metrics_that_training_did_not_write_is_named(line, tmp_path):
    good = '{"stage": "sft", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{good}{line}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(good + line)  # left unfinished by a kill
    assert [m["step"] for m in read_metrics(tmp_path)] == [1]


def test_a_workdir_that_no_file_system_takes_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="File name too long: choose another --workdir"):
        train(config, tmp_path / ("a" * 300), NEVER)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory: choose another --workdir"):
        train(config, tmp_path / "file", NEVER)
