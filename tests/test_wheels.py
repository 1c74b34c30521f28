"""Files out of pinned wheels."""

import subprocess
import zipfile

import pytest

from sdpo_jax.system.errors import InputError
from sdpo_jax.system.wheels import sha256_of, wheel_file


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sdpo_jax" / "a-package-1.0"
    folder.mkdir(parents=True)
    path = folder / "a_package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a_package/../../data.txt", "content")
    return path


def test_a_cached_wheel_needs_no_network(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    arguments = ("a-package", "1.0", sha256_of(wheel), "a_package/../../data.txt")
    for folder in (None, None, tmp_path / "out"):
        path = wheel_file(*arguments, extract_to=folder)
        assert path == (folder or wheel.parent) / "data.txt" and path.read_text() == "content"


def test_a_damaged_member_is_written_again(wheel):
    arguments = ("a-package", "1.0", sha256_of(wheel), "a_package/../../data.txt")
    for damaged in ("cut", "contenT"):
        wheel_file(*arguments).write_text(damaged)
        assert wheel_file(*arguments).read_text() == "content"


def test_a_cached_wheel_of_another_hash_is_not_used(wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    right = sha256_of(wheel)
    wheel.write_bytes(wheel.read_bytes() + b"x")  # a zip that opens
    with pytest.raises(InputError, match=r"a-package==1\.0: pip download failed"):
        wheel_file("a-package", "1.0", right, "a_package/../../data.txt")
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]


def test_without_a_network_the_error_says_where_to_put_the_wheel(wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel.unlink()
    with pytest.raises(InputError, match=f"run again with a network, or copy the wheel to {wheel}"):
        wheel_file("a-package", "1.0", "0" * 64, "data.txt")


def test_a_wheel_of_another_hash_is_not_kept(wheel, monkeypatch):
    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/a.whl", "w"):
            return subprocess.CompletedProcess(command, 0, "", "")

    wheel.unlink()
    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(InputError, match="expected 0000"):
        wheel_file("a-package", "1.0", "0" * 64, "data.txt")
    assert not any(wheel.parent.iterdir())
