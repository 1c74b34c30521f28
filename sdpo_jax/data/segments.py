"""Which windows of a split become one training example.

A candidates prompt has one target. A history's titles are all targets, so a user's windows that
follow one another are one example, cut where it would be too long.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from sdpo_jax.data.prepared import User, Window
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
    """Rows of one user whose targets follow one another, wherever in the split they are."""
    own: dict[User, list[int]] = {}
    for row, window in enumerate(windows):
        own.setdefault(window.user, []).append(row)
    for rows in own.values():
        rows.sort(key=lambda row: windows[row].place)
        # Along a run the number in this order and the target's place grow alike.
        starts = [windows[row].place - n for n, row in enumerate(rows)]
        for _, run in itertools.groupby(zip(starts, rows, strict=True), lambda pair: pair[0]):
            yield [row for _, row in run]


def _parts(encoder: Encoder, split: str, run: list[int], segment: int) -> list[list[int]]:
    for count in range(-(-len(run) // segment), len(run) + 1):
        parts = [part.tolist() for part in np.array_split(run, count)]
        if all(_fits(encoder, split, part) for part in parts):
            return parts
    targets = (encoder.window(split, row).target for row in run)
    raise encoder.no_room(max(len(encoder.answer(item)) for item in targets))


def _fits(encoder: Encoder, split: str, rows: list[int]) -> bool:
    shown = encoder.context(split, rows[0])
    titles = [*shown, *(encoder.window(split, row).target for row in rows)]
    return sum(len(encoder.answer(item)) for item in titles) <= encoder.room
