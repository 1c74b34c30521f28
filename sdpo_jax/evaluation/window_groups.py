"""Windows that are also reported apart: those with cold targets, and those with short histories."""

import functools
from pathlib import Path

from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.evaluation.results import exposure_of

COLD = 5  # a target with fewer interactions in training is cold
SHORT = 5  # a history with fewer titles is short


@functools.lru_cache(maxsize=8)
def read(folder: Path, split: str) -> dict[str, frozenset[int]]:
    """Group -> rows of the windows in it, of a split of a prepared folder."""
    data = read_dataset(folder, [split, "train"])
    windows = list(enumerate(data.splits[split]))
    _, counts = exposure_of(data)
    return {
        "cold targets": frozenset(row for row, window in windows if counts[window.target] < COLD),
        "short histories": frozenset(row for row, window in windows if len(window.history) < SHORT),
    }
