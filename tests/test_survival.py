"""What a run does when something fails under it: nothing that was done is lost or wrong."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import ml_collections
import numpy as np
import pytest
import stress
import trainers
from conftest import tiny_config
from trainers import NEVER, train

from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.system.errors import InputError

STEPS = 6

# Reads of a broken checkpoint that Orbax gives up leave others of the same step behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("kept_compilations"),
]


@pytest.fixture
def config(dataset_folder, model_folder) -> ml_collections.ConfigDict:
    return six_steps(dataset_folder, model_folder)


def six_steps(dataset_folder: Path, model_folder: Path) -> ml_collections.ConfigDict:
    """Of SFT, a checkpoint after every second."""
    config = tiny_config(dataset_folder, model_folder)
    config.stages = ("sft",)
    config.sft.max_steps, config.eval_every, config.checkpoint_every = STEPS, 4, 2
    config.sft.learning_rate, config.validation_windows = 0.01, 8
    return config


def adapter(run: Path, step: int = STEPS) -> list[np.ndarray]:
    checkpoints = Checkpoints(run / "sft", read_only=True)
    stored = checkpoints.restore_raw(step)
    checkpoints.close()
    return [x for layer in stored["layers"].values() for x in layer.values()]


@pytest.fixture(scope="module")
def finished(dataset_folder, model_folder, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    train(six_steps(dataset_folder, model_folder), run, NEVER)
    return run


def reopened(run: Path, copy: Path) -> Path:
    """The run as it was before its stage was called finished."""
    shutil.copytree(run, copy)
    (copy / "stages" / "sft.json").unlink()
    return copy


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def every(damage: Callable[[Path], None], folder: Path, pattern: str = "*") -> None:
    for file in folder.rglob(pattern):
        if file.is_file():
            damage(file)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


# How the newest step is damaged, and whether it can still be used.
DAMAGES = {
    "a_truncated_adapter": (lambda step: every(truncate, step / "lora"), False),
    "flipped_bits_in_the_adapter": (lambda step: every(flip, step / "lora", "d/*"), False),
    "flipped_bits_in_the_moments": (lambda step: every(flip, step / "optimizer", "d/*"), False),
    "no_moments": (lambda step: remove(step / "optimizer"), False),
    "no_position": (lambda step: remove(step / "position"), False),
    "a_truncated_position": (lambda step: every(truncate, step / "position"), False),
    "an_empty_folder": (lambda step: [remove(path) for path in list(step.iterdir())], False),
    "an_empty_description": (lambda step: os.truncate(step / "_CHECKPOINT_METADATA", 0), True),
    "a_truncated_loss": (lambda step: every(truncate, step / "metrics"), True),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_newest_checkpoint_is_told_and_the_one_before_goes_on_bit_equal(
    damage, finished, config, tmp_path, capsys
):
    run = reopened(finished, tmp_path / "damaged")
    break_it, usable = DAMAGES[damage]
    break_it(run / "sft" / str(STEPS))
    train(config, run, NEVER)
    told = f"warning: {run}/sft/{STEPS}: " in capsys.readouterr().out
    assert told != usable
    for found, expected in zip(adapter(run), adapter(finished), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_single_flipped_bit_of_what_was_stored_is_noticed(finished, config, tmp_path, capsys):
    """Wherever it lies: each file of the newest step in turn."""
    step = finished / "sft" / str(STEPS)
    checkpoints = Checkpoints(finished / "sft", read_only=True)
    whole = adapter(finished)
    for file in sorted(f for f in (step / "lora").rglob("*") if f.is_file()):
        content = file.read_bytes()
        flip(file)
        try:
            found = adapter(finished)
        except Exception as error:
            assert type(error).__name__ == "CheckpointGone", error
        else:  # a bit of a description that nothing depends on
            assert all(a.tobytes() == b.tobytes() for a, b in zip(found, whole, strict=True))
        file.write_bytes(content)
    checkpoints.close()


def test_without_any_whole_checkpoint_the_stage_says_so_and_ends(finished, config, tmp_path):
    run = reopened(finished, tmp_path / "damaged")
    for step in (run / "sft").iterdir():
        if step.name.isdigit():
            every(truncate, step / "lora")
    with pytest.raises(InputError, match="delete this folder to start the stage again"):
        train(config, run, NEVER)


def test_a_loss_that_is_no_number_stops_at_its_step_and_names_the_lines(config, tmp_path):
    run = tmp_path / "run"
    config.sft.learning_rate = 1e30
    config.checkpoint_every = 1
    with pytest.raises(InputError, match=r"sft step [23]: .*nan"):
        train(config, run, NEVER)
    broken = json.loads((run / "stages" / "sft-broken-step.json").read_text())
    assert len(broken["lines"]) == config.batch_size and min(broken["lines"]) >= 1
    checkpoints = Checkpoints(run / "sft", read_only=True)
    assert max(checkpoints.steps()) < broken["step"]
    checkpoints.close()
    assert all(np.isfinite(x).all() for x in adapter(run, 1))


def test_a_second_trainer_on_a_workdir_is_refused(dataset_folder, model_folder, tmp_path):
    run = tmp_path / "run"
    flags = trainers.config_flags(run, dataset_folder, model_folder, stress.STEPS)
    first = trainers.start(flags)
    trainers.wait_for_step(first, run, "sft", 1)
    first.send_signal(signal.SIGSTOP)  # so that it lasts
    refused = trainers.end(trainers.start(flags), expected=2)
    assert "another process is training in it" in refused.splitlines()[-1]
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    trainers.end(first, expected=os.EX_TEMPFAIL)


def test_a_dozen_kills_at_random_moments_change_no_bit(dataset_folder, model_folder, tmp_path):
    report = stress.stress(tmp_path, 12, 0, dataset_folder, model_folder)
    assert report.kills.total() == 12
    assert report.finished and not report.differences


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes: (its folder, how to mount it again with other options)."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")

    mount("size=6m")
    yield folder, mount
    subprocess.run(["umount", str(folder)], check=True)


def filled(run: Path, filler: Path) -> bool:
    """Fills the disk once the first checkpoint is there."""
    if (run / "sft" / "2").exists() and not filler.exists():
        filler.write_bytes(b"0" * (shutil.disk_usage(run).free - 200_000))
    return False


def test_a_full_disk_is_one_line_and_the_run_goes_on_with_more_space(config, finished, small_disk):
    disk, _ = small_disk
    run, filler = disk / "run", disk / "filler"
    fills = SimpleNamespace(ask=lambda: filled(run, filler), check=lambda: None)
    with pytest.raises(InputError, match=r"sft: found 0\.00 GB free.*: free space"):
        train(config, run, fills)
    filler.unlink()
    train(config, run, NEVER)
    for found, expected in zip(adapter(run), adapter(finished), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_read_only_workdir_is_refused_before_anything_is_written(config, small_disk):
    disk, mount = small_disk
    mount("remount,ro")
    with pytest.raises(InputError, match="Read-only file system: choose another --workdir"):
        train(config, disk / "run", NEVER)
    assert not list(disk.iterdir())


def test_a_clock_that_jumps_back_changes_nothing(config, finished, tmp_path, monkeypatch):
    run, clock, calls = tmp_path / "run", time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() - (7200 if next(calls) > 20 else 0))
    train(config, run, NEVER)
    monkeypatch.undo()
    for found, expected in zip(adapter(run), adapter(finished), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert json.loads((run / "stages" / "sft.json").read_text())["seconds"] >= 0


def test_a_terminal_of_another_locale_shows_titles_and_changes_nothing(
    dataset_folder, model_folder, tmp_path
):
    template = tmp_path / "prompts.txt"
    template.write_text("Déjà vu: [HistoryHere] Sırada: [CansHere]\n", encoding="utf-8")
    made = {}
    for name, settings in (
        ("plain", {}),
        (
            "other",
            {
                "LC_ALL": "tr_TR.ISO-8859-9",
                "PYTHONIOENCODING": "ascii",
                "PYTHONUTF8": "0",
                "TZ": "Asia/Kathmandu",
            },
        ),
    ):
        run = tmp_path / name
        flags = trainers.config_flags(
            run, dataset_folder, model_folder, 3, prompt_file=template, stages="('sft',)"
        )
        trainers.end(trainers.start(flags, **settings))
        made[name] = run
    assert trainers.differences(made["other"], made["plain"], 3) == 0
