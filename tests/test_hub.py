"""A model by its name on the Hub: from the cache, or one line that says what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import hf_folder

from sdpo_jax.system.errors import InputError
from sdpo_jax.system.hub import hub_folder, is_hub_name

ROOT = Path(__file__).parents[1]


def convert_offline(name: str, cache: Path, output: Path) -> subprocess.CompletedProcess:
    """In a process of its own, since the Hub's settings are read when it is imported."""
    return subprocess.run(
        [sys.executable, "-m", "sdpo_jax.convert", f"--model={name}", f"--output={output}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
    )


def test_a_cached_model_converts_without_a_network_under_its_name(tmp_path):
    repo = tmp_path / "cache" / "models--tiny--llama"
    hf_folder(tmp_path / "hf")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.move(tmp_path / "hf", repo / "snapshots" / ("0" * 40))
    done = convert_offline("tiny/llama", tmp_path / "cache", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert '"source": "tiny/llama"' in (tmp_path / "out" / "model.json").read_text()


def test_without_network_and_cache_it_says_what_to_do(tmp_path):
    done = convert_offline("tiny/absent", tmp_path / "cache", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: --model=tiny/absent") and "give its folder" in line


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("org/name@main", True),
        ("name", False),
        ("/srv/models/llama", False),
        ("a/b/c", False),
        ("../x", False),
        ("~/x", False),
    ],
)
def test_what_counts_as_a_name(model, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(model) == expected


def test_a_folder_that_is_there_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_name("org/name")


def test_a_download_that_breaks_is_one_line(monkeypatch):
    def breaks(*args, **kwargs):
        raise RuntimeError("the connection was cut")

    monkeypatch.setattr("huggingface_hub.snapshot_download", breaks)
    with pytest.raises(InputError, match=r"org/name.*the connection was cut"):
        hub_folder("org/name@main")
