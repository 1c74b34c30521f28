"""Which windows of a split become one training example.

A candidates prompt has one target. A history's titles are all targets, so a user's windows that
follow one another are one example, cut where it would be too long.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from sdpo_jax.data.prepared import Window
from sdpo_jax.data.tokens import Encoder

Unit = tuple[int, ...]  # row numbers of a split


def units(encoder: Encoder, split: str, segment: int) -> list[Unit]:
    """The rows of each example of a split, in order; `segment`: the most targets of one.

    A user's windows are cut into equal parts, as few as fit beside their context into the
    encoder's `max_length`. Raises InputError where one target alone does not fit.
    """
    windows = encoder.dataset.splits[split]
    if encoder.prompt == "candidates":
        return [(row,) for row in range(len(windows))]
    return [tuple(part) for run in _runs(windows) for part in _parts(encoder, split, run, segment)]


def _runs(windows: Sequence[Window]) -> Iterator[list[int]]:
    """Rows of one user whose targets follow one another."""
    # Along a run the row and the target's place grow alike.
    keyed = itertools.groupby(
        range(len(windows)), lambda row: (windows[row].user, windows[row].place - row)
    )
    return (list(rows) for _, rows in keyed)


def _parts(encoder: Encoder, split: str, run: list[int], segment: int) -> list[np.ndarray]:
    count = -(-len(run) // segment)
    while True:
        parts = np.array_split(run, count)
        if count == len(run) or all(_fits(encoder, split, part.tolist()) for part in parts):
            return [part.tolist() for part in parts]
        count += 1


def _fits(encoder: Encoder, split: str, rows: list[int]) -> bool:
    shown = encoder.context(split, rows[0])
    titles = [*shown, *(encoder.window(split, row).target for row in rows)]
    return sum(len(encoder.answer(item)) for item in titles) <= encoder.room
