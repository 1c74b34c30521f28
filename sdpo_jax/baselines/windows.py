"""Windows as arrays of item numbers: an item's line in items.jsonl, from 0 to I - 1.

X: the items among which a target is ranked.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sdpo_jax.data.prepared import Dataset, Window


@dataclasses.dataclass(frozen=True)
class Arrays:
    """`history_BT` is left-padded with I, one past the last item's number; all int32."""

    history_BT: np.ndarray
    candidates_BC: np.ndarray
    target_B: np.ndarray


def arrays(dataset: Dataset, windows: Sequence[Window]) -> Arrays:
    """Item numbers of `windows`; T is the most items that a window of the data set shows."""
    number = {item: n for n, item in enumerate(dataset.titles)}
    T = dataset.meta["history"]
    history_BT = np.full((len(windows), T), len(number), np.int32)
    for row, window in zip(history_BT, windows, strict=True):
        row[T - len(window.history) :] = [number[item] for item in window.history]
    return Arrays(
        history_BT,
        np.array([[number[item] for item in w.candidates] for w in windows], np.int32),
        np.array([number[w.target] for w in windows], np.int32),
    )


def place(among_X: np.ndarray, target: int) -> int:
    """Index of `target` in `among_X`, which contains it once."""
    return int(np.flatnonzero(among_X == target)[0])
