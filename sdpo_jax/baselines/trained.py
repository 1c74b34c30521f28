"""Trained networks on disk: safetensors files with a key of data set and settings as metadata."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import whole_file

AGAIN = "remove it to train again, or choose another --workdir"


def key(dataset_fingerprint: str, settings: Any, *more: Any) -> str:
    """SHA-256 of all that the weights depend on."""
    content = [dataset_fingerprint, dataclasses.asdict(settings), *more]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_writable(folder: Path) -> None:
    """Makes the folder. Raises InputError, before hours of training, if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}: choose another --workdir") from error
    if not writable:
        raise InputError(f"{folder}: found no permission to write: choose another --workdir")


def write(path: Path, key: str, dataset: str, state: nnx.State, about: dict[str, Any]) -> None:
    """Writes a network atomically; `dataset` is the fingerprint of its data set.

    Raises InputError if the file cannot be written.
    """
    tensors = {name: np.asarray(leaf) for name, leaf in zip(*_named(state), strict=True)}
    try:
        meta = {"key": key, "dataset": dataset, "about": json.dumps(about)}
        with whole_file(path) as partial:
            save_file(tensors, partial, metadata=meta)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path}: cannot be written ({error}): free space or correct permissions"
        ) from error


def read(path: Path, key: str, fresh: nnx.State) -> tuple[nnx.State, dict[str, Any]] | None:
    """The state, structured as `fresh`, and `about` given to `write`; None if there is no file.

    Raises InputError for a broken file, another data set or other settings.
    """
    if not os.path.lexists(path):
        return None
    names, leaves = _named(fresh)
    try:
        with safe_open(path, "numpy") as file:
            meta = file.metadata() or {}
            if meta.get("key") != key:
                raise InputError(
                    f"{path}: found a network of another data set or other settings, expected "
                    f"those of this command: {AGAIN}"
                )
            if set(file.keys()) != set(names):
                raise SafetensorError("other tensors than this network has")
            found = [file.get_tensor(name) for name in names]
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: found {error}, expected a saved network: {AGAIN}") from error
    if [x.shape for x in found] != [x.shape for x in leaves]:
        raise InputError(
            f"{path}: found tensors of another shape, expected this network's: {AGAIN}"
        )
    return jax.tree.unflatten(jax.tree.structure(fresh), found), json.loads(meta["about"])


def _named(state: nnx.State) -> tuple[list[str], list[jax.Array]]:
    """Names and arrays of all leaves, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return names, [leaf for _, leaf in leaves]
