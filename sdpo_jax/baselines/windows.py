"""Windows as arrays of item numbers: the place of an item in items.jsonl, from 0 to I - 1."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from sdpo_jax.data.prepared import Dataset, Window


@dataclasses.dataclass(frozen=True)
class Arrays:
    """`history_NT` is padded on its left with I, the number of no item; all int32."""

    history_NT: np.ndarray
    candidates_NC: np.ndarray
    target_N: np.ndarray


def arrays(dataset: Dataset, windows: Sequence[Window]) -> Arrays:
    """The item numbers of `windows`, T being the most items that the data set's windows show."""
    number = {item: n for n, item in enumerate(dataset.titles)}
    T = dataset.meta["history"]
    history_NT = np.full((len(windows), T), len(number), np.int32)
    for row, window in zip(history_NT, windows, strict=True):
        row[T - len(window.history) :] = [number[item] for item in window.history]
    return Arrays(
        history_NT,
        np.array([[number[item] for item in w.candidates] for w in windows], np.int32),
        np.array([number[w.target] for w in windows], np.int32),
    )


def place(among_X: np.ndarray, target: int) -> int:
    """Where `target` stands in `among_X`, which holds it once."""
    return int(np.flatnonzero(among_X == target)[0])
