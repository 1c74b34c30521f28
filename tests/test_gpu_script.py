"""The script for an accelerator: what is done lies on disk, whatever happens to the rest."""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import gpu
from sdpo_jax.system.errors import InputError


def part(name: str, program: str, limit: float = 60) -> gpu.Part:
    return gpu.Part(name, limit, ((sys.executable, "-c", program),))


def test_a_part_that_is_cut_or_fails_leaves_the_others_and_is_told(tmp_path):
    endless = "import time; print('begun', flush=True); time.sleep(600)"
    parts = [
        part("quick", f"open({str(tmp_path / 'quick.json')!r}, 'w').write('1')"),
        part("slow", endless),
        part("wrong", "raise SystemExit(3)"),
        part("last", "print('done')"),
    ]
    summary = gpu.run_parts(parts, tmp_path, cut=3)
    assert summary == json.loads((tmp_path / "summary.json").read_text())
    assert {name: found["status"] for name, found in summary.items()} == {
        "quick": 0,
        "slow": 124,
        "wrong": 3,
        "last": 0,
    }
    assert summary["slow"]["found"] == "cut after 3 s" and summary["slow"]["seconds"] < 12
    assert "begun" in (tmp_path / "slow.log").read_text()
    assert (tmp_path / "quick.json").exists()


def test_the_same_command_goes_on_and_names_start_parts_again(tmp_path):
    count = tmp_path / "count"
    adds = f"open({str(count)!r}, 'a').write('x')"
    parts = [part("first", adds), part("second", "raise SystemExit(1)")]
    gpu.run_parts(parts, tmp_path)
    gpu.run_parts([parts[0], part("second", adds)], tmp_path)
    assert count.read_text() == "xx"  # the first one only once
    gpu.run_parts(parts, tmp_path, only=["first"])
    assert count.read_text() == "xxx"
    with pytest.raises(InputError, match="--parts: found third, expected some of first, second"):
        gpu.run_parts(parts, tmp_path, only=["third"])


def test_the_parts_take_nine_minutes_and_a_model_is_converted_only_where_it_is_not(tmp_path):
    args = SimpleNamespace(
        size="7b", model=str(tmp_path / "m.gguf"), dataset="D", candidates=[], study=""
    )
    names = [part.name for part in gpu.parts(args, tmp_path)]
    assert names[:3] == ["parity", "convert", "histories"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").write_text("{}")
    args.model, args.candidates = str(tmp_path / "model"), ["runs/lastfm/data"]
    parts = gpu.parts(args, tmp_path)
    assert "convert" not in [part.name for part in parts]
    assert "candidates-lastfm" in [part.name for part in parts]
    (tmp_path / "lastfm" / "data").mkdir(parents=True)
    args.study = str(tmp_path)
    assert "--datasets=lastfm" in gpu.parts(args, tmp_path)[-1].commands[0]
    assert sum(part.limit for part in parts) <= 9 * 60


def test_versions_that_the_package_does_not_run_with_are_told_before_anything_runs(monkeypatch):
    gpu.check_versions()
    version = importlib.metadata.version

    def old(name):
        return "0.12.4" if name == "orbax-checkpoint" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", old)
    with pytest.raises(
        InputError, match=r"found orbax-checkpoint 0\.12\.4, expected .*>=0\.12\.8.*"
    ):
        gpu.check_versions()
