"""Draws the rejected titles of a target, as pure functions of (seed, draw, row)."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sdpo_jax.data.prepared import Dataset, User, Window
from sdpo_jax.data.randomness import generator
from sdpo_jax.system.errors import InputError

TRIES = 512  # draws with replacement before a permutation of all items
NEGATIVES = ("shown", "uniform", "popularity", "hard", "disliked")


class Negatives:
    """Draws the rejected titles of a target.

    `kind`, one of NEGATIVES:
      shown: from the other candidates of the window (the paper).
      uniform: from all items.
      popularity: from all items, by their number of training targets to the power `power`.
      hard: as uniform, into a pool from which the reference's log-probs choose (`hard_band`).
      disliked: from the user's items rated below the protocol's minimum, up to the end of the
        segment; filled up as uniform.

    Except for `shown`, titles are distinct, and none is the user's up to the last target of the
    split. Titles of the user's later targets can be drawn: otherwise their absence from training's
    negatives would reveal the test targets.
    """

    def __init__(self, dataset: Dataset, kind: str, seed: int, power: float = 1.0):
        self.dataset, self.kind, self.seed = dataset, kind, seed
        self._items = list(dataset.titles)
        counts = dict.fromkeys(self._items, 0)
        for window in dataset.splits["train"] if kind == "popularity" else ():
            counts[window.target] += 1
        self._shares = _shares(np.array(list(counts.values()), float), power)
        self._own = {split: _own_titles(dataset, split) for split in dataset.splits}

    def draw(self, split: str, row: int, count: int, draw: int = 0, until: int = 0) -> list[int]:
        """`count` negatives of a row's target; the draws 0, 1, … are independent.

        `until`: the place in the user's sequence up to which dislikes count, at least the target's.
        Raises InputError if there are too few titles.
        """
        window = self.dataset.splits[split][row]
        random = generator(self.seed, f"negatives/{draw}" if draw else "negatives", split, row)
        if self.kind == "shown":
            others = [item for item in window.candidates if item != window.target]
            return [others[i] for i in random.choice(len(others), count, replace=False)]
        chosen: list[int] = []
        taken = {*self._own[split][window.user], self.dataset.titles[window.target]}
        if self.kind == "disliked":
            disliked = self.dataset.sequences[window.user].disliked
            near = [item for place, item in disliked if place <= max(until, window.place)]
            self._take((near[i] for i in random.permutation(len(near))), count, taken, chosen)
        self._take(self._any(random), count, taken, chosen)
        if len(chosen) < count:
            key = "hard_pool" if self.kind == "hard" else "num_negatives"
            raise InputError(
                f"config.{key}: found {len(chosen)} titles beside those of user {window.user}, "
                f"expected {count}: lower it"
            )
        return chosen

    def _take(self, items: Iterable[int], count: int, taken: set[str], chosen: list[int]) -> None:
        """Appends items whose titles are not in `taken` to `chosen`, until it has `count`."""
        for item in items:
            if len(chosen) >= count:
                return
            if (title := self.dataset.titles[item]) not in taken:
                taken.add(title)
                chosen.append(item)

    def _any(self, random: np.random.Generator) -> Iterable[int]:
        """TRIES items drawn by their shares, then a permutation of all items."""
        if self._shares is None:
            places = random.integers(len(self._items), size=TRIES)
        else:
            places = np.searchsorted(self._shares, random.random(TRIES), side="right")
        for place in places:
            yield self._items[place]
        for place in random.permutation(len(self._items)):  # drawn only if needed, as it is O(n)
            yield self._items[place]


def against_disliked(dataset: Dataset, split: str) -> dict[int, Window]:
    """Row -> its window with two candidates: the target, and an item that the same user rated low.

    The item is drawn from those that the user rated after the window's history: training, which
    ends before a window of another split, used none of them as `disliked`. Rows without such an
    item are left out.
    """
    found = {}
    for row, window in enumerate(dataset.splits[split]):
        disliked = dataset.sequences[window.user].disliked
        if later := [item for place, item in disliked if place >= window.place]:
            drawn = generator(0, "against disliked", split, row).integers(len(later))
            candidates = (window.target, later[drawn])
            found[row] = dataclasses.replace(window, candidates=candidates)
    return found


def _own_titles(dataset: Dataset, split: str) -> dict[User, frozenset[str]]:
    """The titles of each user up to the last target of a split.

    Titles instead of ids, since a model cannot distinguish equal titles.
    """
    last: dict[User, int] = {}
    for window in dataset.splits[split]:
        last[window.user] = max(window.place, last.get(window.user, 0))
    return {
        user: frozenset(dataset.titles[item] for item in dataset.sequences[user].items[: place + 1])
        for user, place in last.items()
    }


def _shares(counts: np.ndarray, power: float) -> np.ndarray | None:
    """Cumulative shares of counts to a power, the last one 1; None if all counts are 0."""
    if not counts.any():
        return None
    sums = np.cumsum((counts / counts.max()) ** power)
    return sums / sums[-1]
