"""Candidate lists of windows: the target and, by default, 19 negatives."""

import dataclasses
import random
from collections.abc import Sequence

from sdpo_jax.data.prepared import Window
from sdpo_jax.data.randomness import generator
from sdpo_jax.system.errors import InputError

NUM_CANDIDATES = 20


def independent(
    windows: Sequence[Window],
    titles: dict[int, str],
    seed: int,
    split: str,
    count: int = NUM_CANDIDATES,
) -> list[Window]:
    """Windows with `count` candidates drawn by (seed, split, row), independently of the target.

    All titles of candidates and history differ, since the title is the model's answer. Exception:
    the target stays where the history contains it, or its title under another id. Raises
    InputError if there are too few items.
    """
    ids = list(titles)
    return [
        _draw(window, row, ids, titles, seed, split, count) for row, window in enumerate(windows)
    ]


def _draw(
    window: Window,
    row: int,
    ids: list[int],
    titles: dict[int, str],
    seed: int,
    split: str,
    count: int,
) -> Window:
    """Takes negatives from a permutation of all items, which is independent of the target."""
    rng = generator(seed, "candidates", split, row)
    place = int(rng.integers(count))
    order = rng.permutation(len(ids))
    used = {titles[item] for item in window.history} | {titles[window.target]}
    chosen: list[int] = []
    for index in order:
        item = ids[index]
        if titles[item] not in used:
            used.add(titles[item])
            chosen.append(item)
            if len(chosen) == count - 1:
                break
    else:
        raise _too_few(len(chosen), f"window {row} of {split}", count)
    chosen.insert(place, window.target)
    return dataclasses.replace(window, candidates=tuple(chosen))


def _too_few(found: int, window: str, count: int = NUM_CANDIDATES) -> InputError:
    return InputError(
        f"items: found {found} titles outside {window}, expected {count - 1} or more: give a "
        "--source with more items or fewer --num_candidates"
    )


def released(windows: Sequence[Window], ids: Sequence[int]) -> list[Window]:
    """Windows with the candidate lists that the S-DPO authors released for LastFM.

    Their rule seeds Python's `random` with the target id, so the list is nearly a function of
    the target: a look-up that ignores the history scores HR@1 0.99. `ids`: item ids in the order
    of id2name.txt. Raises InputError if there are too few items.
    """
    place = {item: index for index, item in enumerate(ids)}
    return [_released(window, ids, place) for window in windows]


def _released(window: Window, ids: Sequence[int], place: dict[int, int]) -> Window:
    removed = sorted({place[item] for item in (*window.history, window.target)})
    if len(ids) - len(removed) < NUM_CANDIDATES - 1:
        raise _too_few(len(ids) - len(removed), f"a window of user {window.user}")
    chosen = []
    # Sampling positions instead of building the pool gives the same draw and is 5x faster.
    for index in random.Random(window.target).sample(
        range(len(ids) - len(removed)), NUM_CANDIDATES - 1
    ):
        for gap in removed:
            index += gap <= index
        chosen.append(ids[index])
    chosen.append(window.target)
    random.Random(window.target).shuffle(chosen)
    return dataclasses.replace(window, candidates=tuple(chosen))
