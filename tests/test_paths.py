"""`~` and relative paths mean the same in every option and config key, in whatever folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdpo_jax.runs import presets
from sdpo_jax.runs.config import RunConfig, keys
from sdpo_jax.system import command
from sdpo_jax.system.errors import InputError

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")


@pytest.mark.parametrize(
    ("argument", "read"),
    [
        ("--output=~/runs/data", "--output=/home/ann/runs/data"),
        ("--config.dataset=~/data", "--config.dataset=/home/ann/data"),
        ("--config=~/my.py:smoke", "--config=/home/ann/my.py:smoke"),
        ("--workdir=~", "--workdir=/home/ann"),
        ("-source=~/x", "-source=/home/ann/x"),
        ("--delimiter=~", "--delimiter=~"),
        ("--source=/a/~b", "--source=/a/~b"),
        ("--parameters={}", "--parameters={}"),
        ("--explain", "--explain"),
        ("~/x", "~/x"),
    ],
)
def test_the_home_folder_stands_for_a_tilde_in_every_option(argument, read):
    assert command._expanded(argument) == read


def test_the_home_of_nobody_is_refused():
    with pytest.raises(InputError, match="--output: found '~no-such-user/x', expected the home"):
        command._expanded("--output=~no-such-user/x")


def test_the_home_folder_stands_for_a_tilde_in_every_path_of_a_config_file():
    found = presets.get_config()
    paths = [name for name, field, _ in keys() if field.metadata["path"]]
    for key in paths:
        found.update_from_flattened_dict({key: f"~/{key}"})
    read = dict((name, value) for name, _, value in keys(RunConfig.of(found.to_dict())))
    assert len(paths) > 3 and [read[key] for key in paths] == [f"/home/ann/{key}" for key in paths]


def test_a_config_without_a_path_is_left_to_the_check_of_its_keys():
    found = presets.get_config()
    del found.item_vectors
    with found.unlocked(), found.ignore_type():
        found.lora, found.model = None, 7
    with pytest.raises(InputError):
        RunConfig.of(found.to_dict())


def test_a_config_file_is_read_in_any_folder(tmp_path):
    (tmp_path / "mine.py").write_text((ROOT / "configs" / "quickstart.py").read_text())
    for file in ("configs/quickstart.py", "mine.py"):
        done = subprocess.run(
            [sys.executable, "-m", "sdpo_jax.train", f"--config={file}:smoke"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: nothing to train on yet: first run"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_config_of_the_package_is_found_where_the_current_folder_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, read = ROOT / "configs" / "quickstart.py", command._packaged_config
    assert read("--config=configs/quickstart.py:smoke") == f"--config={file}:smoke"
    assert read("configs/quickstart.py") == str(file)
    assert read("--config=configs/none.py") == "--config=configs/none.py"
    own = tmp_path / "configs" / "quickstart.py"
    own.parent.mkdir()
    own.touch()
    assert read("--config=configs/quickstart.py") == "--config=configs/quickstart.py"
