"""The reference's log-probs: computed once per (target, candidate) and stored on disk.

The reference is the same graph with the adapter of SFT, so there is no second model in memory and
no reference pass in the step. X: the targets of all examples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdpo_jax.data.tokens import Example
from sdpo_jax.system.files import whole_file
from sdpo_jax.system.sharding import to_host


def fingerprint(base: str, lora: Any, examples: Sequence[Example], settings: Mapping) -> str:
    """SHA-256 over base, adapter, tokens and the settings that change log-probs."""
    # "logp" is the array's name in the file: a file of another form has another fingerprint.
    digest = hashlib.sha256(json.dumps(["logp", base, dict(settings)], sort_keys=True).encode())
    for leaf in jax.tree.leaves(lora):
        digest.update(to_host(leaf).tobytes())
    for example in examples:
        for ids in (example.prompt, np.array(example.places, np.int32), *example.answers):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest()


def read_reference(path: Path, expected: str) -> np.ndarray | None:
    """The stored `logp_XC`, or None if there is none or its fingerprint differs.

    It is NaN where an interrupted pass did not arrive.
    """
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return stored["logp"] if str(stored["fingerprint"]) == expected else None


def write_reference(path: Path, key: str, logp_XC: np.ndarray) -> None:
    """Writes float32 log-probs with their fingerprint, atomically; process 0 only."""
    if jax.process_index() > 0:
        return
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(file, logp=logp_XC.astype(np.float32), fingerprint=np.array(key))
