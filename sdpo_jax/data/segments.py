"""Groups the windows of a split into training examples.

A candidates prompt has one target. In a history prompt all titles are targets, so a user's
consecutive windows form one example, which is cut if it is too long.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from sdpo_jax.data.prepared import User, Window
from sdpo_jax.data.tokens import Encoder

Unit = tuple[int, ...]  # row numbers of a split


def units(encoder: Encoder, split: str, segment: int) -> list[Unit]:
    """The rows of each example of a split, in order, with at most `segment` targets per example.

    A user's consecutive windows are cut into the fewest equal parts that, with their context, fit
    into the encoder's `max_length`. Raises InputError if one target alone does not fit.
    """
    windows = encoder.dataset.splits[split]
    if encoder.prompt == "candidates":
        return [(row,) for row in range(len(windows))]
    return [tuple(part) for run in _runs(windows) for part in _parts(encoder, split, run, segment)]


def _runs(windows: Sequence[Window]) -> Iterator[list[int]]:
    """The rows of each user's consecutive targets, wherever in the split they are."""
    own: dict[User, list[int]] = {}
    for row, window in enumerate(windows):
        own.setdefault(window.user, []).append(row)
    for rows in own.values():
        rows.sort(key=lambda row: windows[row].place)
        # Along a run, the target's place minus the index in `rows` is constant.
        for _, run in itertools.groupby(
            enumerate(rows), lambda pair: windows[pair[1]].place - pair[0]
        ):
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
