"""Trackers get a run's curves through their own packages, without a network."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from trainers import ROOT, environment

from sdpo_jax.runs.trackers import Lenient, check_tracker, open_tracker
from sdpo_jax.system.errors import InputError

# Two steps of SFT, a restart, a third step, and one of S-DPO.
WRITES = """
import sys
from pathlib import Path
from sdpo_jax.runs.trackers import open_tracker

name, run = sys.argv[1], Path(sys.argv[2])
for stage, steps in (("sft", (1, 2)), ("sft", (3,)), ("sdpo", (1,))):
    tracker = open_tracker(name, run, stage, {"lora.rank": 8})
    for step in steps:
        tracker.write(step, {"loss": 0.5 * step, "rewards/chosen": 0.25})
    tracker.close(stage == "sdpo")
"""


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "metrics").mkdir(parents=True)
    return folder


def write(name: str, run: Path, **variables: str) -> None:
    command = [sys.executable, "-c", WRITES, name, str(run)]
    found = environment() | {"HOME": str(run.parent)} | variables
    subprocess.run(command, cwd=ROOT, env=found, check=True, timeout=120, capture_output=True)


def test_mlflow_has_one_run_with_the_curves_of_both_stages(run, tmp_path):
    pytest.importorskip("mlflow")
    store = tmp_path / "store"
    variables = {"MLFLOW_TRACKING_URI": store.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    write("mlflow", run, **variables)
    (known,) = store.glob("*/*/metrics")
    assert known.parent.name == json.loads((run / "metrics" / "mlflow.json").read_text())["run_id"]
    lines = (known / "sft" / "loss").read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [["0.5", "1"], ["1.0", "2"], ["1.5", "3"]]
    assert (known / "sdpo" / "rewards" / "chosen").read_text().split()[1:] == ["0.25", "1"]
    assert (known.parent / "params" / "lora.rank").read_text() == "8"


def test_trackio_has_one_run_with_the_curves_of_both_stages(run, tmp_path):
    pytest.importorskip("trackio")
    write("trackio", run, TRACKIO_DIR=str(tmp_path / "trackio"))
    (file,) = (tmp_path / "trackio").glob("sdpo_jax*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("select run_name, metrics from metrics order by id").fetchall()
    metrics = [json.loads(text) for _, text in rows]
    assert {name for name, _ in rows} == {
        json.loads((run / "metrics" / "trackio.json").read_text())["run_id"]
    }
    assert [m["sft/loss"] for m in metrics if "sft/loss" in m] == [0.5, 1.0, 1.5]
    assert [m["sdpo/step"] for m in metrics if "sdpo/step" in m] == [1]


def test_wandb_writes_the_curves_of_both_stages_offline(run):
    pytest.importorskip("wandb")
    write("wandb", run, WANDB_MODE="offline")
    files = sorted((run / "metrics" / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((run / "metrics" / "wandb.json").read_text())["run_id"]
    assert files and {path.stem for path in files} == {f"run-{identity}"}
    content = b"".join(path.read_bytes() for path in files)
    assert b"rewards/chosen" in content and b"sdpo/step" in content


def test_a_tracker_that_cannot_begin_is_one_line_and_one_that_fails_later_ends_nothing(
    run, tmp_path, monkeypatch, capsys
):
    def refuse(*args, **kwargs):
        raise OSError("no server\nmore")

    module = SimpleNamespace(__name__="trackio", init=refuse, log=refuse, finish=refuse)
    monkeypatch.setitem(sys.modules, "trackio", module)
    with pytest.raises(InputError, match=r"'trackio', which cannot begin \(no server\)"):
        open_tracker("trackio", run, "sft", {})
    module.init = lambda **settings: None
    tracker = Lenient(open_tracker("trackio", run, "sft", {}))
    for step in (1, 2):
        tracker.write(step, {"loss": 1.0})
    tracker.close(True)
    assert capsys.readouterr().out.count("gets no more: no server") == 1


def test_a_tracker_whose_package_is_missing_is_told_before_anything_is_written(monkeypatch):
    check_tracker("none")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"config\.tracker is 'wandb', expected an installed"):
        check_tracker("wandb")
