"""Chronological sequences, their split, and windows (history -> target).

X counts interactions, of a source or a part of it; Y those of one user, Z the low-rated ones.
"""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from sdpo_jax.data.interactions import Interactions
from sdpo_jax.data.prepared import User, UserSequence, Window

MIN_HISTORY = 3
MAX_HISTORY = 10
MIN_RATING = 3
SPLITS = ("train", "val", "test")

# split -> user -> sequence
Splits = dict[str, dict[User, UserSequence]]
Windows = dict[str, list[Window]]


@dataclasses.dataclass(frozen=True)
class Histories:
    """`sequences`: by user, in the order of their first items.

    `ranks`: user -> for each item of the sequence its index among all interactions by time.
    `tied`: user -> the share of neighbouring items of the sequence with equal times.
    """

    sequences: dict[User, UserSequence]
    ranks: dict[User, np.ndarray]
    tied: dict[User, float]


def by_user(found: Interactions, *, rated: bool, repeats: bool, least: int, seed: int) -> Histories:
    """Every user's items by time.

    Args:
      found: the interactions.
      rated: items rated below 3 are not in a sequence but in its `disliked`, if the user never
        rated the item, or one of the same title, 3 or more.
      repeats: a user may have an item several times; otherwise the first counts. Negatives are
        never titles of the history, so a repeated target could be found without a model: as the
        candidate that is in the history.
      least: users and items with fewer interactions are dropped repeatedly until none is left.
      seed: of the drawn order of interactions with equal times. A file's order, often by item,
        would be a pattern that a model learns though it is not a preference.
    """
    order_X = _in_time(found, seed)
    user_X, item_X = found.user_X[order_X], found.item_X[order_X]
    liked_X = np.ones(len(order_X), bool)
    if rated and found.rating_X is not None:
        liked_X = found.rating_X[order_X] >= MIN_RATING
    rank_X = np.flatnonzero(liked_X)
    if not repeats:
        rank_X = rank_X[_first(user_X[rank_X], item_X[rank_X])]
    rank_X = rank_X[core(user_X[rank_X], item_X[rank_X], least)]
    low_X = np.flatnonzero(~liked_X)
    if least > 1:
        low_X = low_X[np.isin(item_X[low_X], item_X[rank_X])]
    low_X = low_X[_first(user_X[low_X], item_X[low_X])]
    ranks, low = _per_user(user_X, rank_X), _per_user(user_X, low_X)
    sequences, tied, time_X = {}, {}, found.time_X[order_X]
    for number, own in ranks.items():
        user, items = found.users[number], [found.items[item] for item in item_X[own].tolist()]
        disliked = _disliked(found, items, own, item_X, low.get(number, own[:0]))
        sequences[user] = UserSequence(user, tuple(items), disliked)
        if len(own) > 1:
            tied[user] = float((np.diff(time_X[own]) == 0).mean())
    return Histories(sequences, {found.users[user]: own for user, own in ranks.items()}, tied)


def _in_time(found: Interactions, seed: int) -> np.ndarray:
    """Indices of all interactions by time, those with equal times in a drawn order.

    The draw is a function of (seed, user, title), so neither the order of a file nor further lines
    change it.
    """
    order_X = np.argsort(found.time_X, kind="stable")
    tied_X = np.zeros(len(order_X), bool)
    tied_X[1:] = np.diff(found.time_X[order_X]) == 0
    tied_X[:-1] |= tied_X[1:]
    drawn_X = np.zeros(len(order_X), np.uint64)
    for place in order_X[tied_X].tolist():
        user, item = found.users[found.user_X[place]], found.items[found.item_X[place]]
        key = f"{seed}/{user}/{found.titles[item]}".encode("utf-8", "surrogatepass")
        drawn_X[place] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
    return np.lexsort((drawn_X, found.time_X))


def _disliked(
    found: Interactions, items: list[int], own_Y: np.ndarray, item_X: np.ndarray, low_Z: np.ndarray
) -> tuple[tuple[int, int], ...]:
    """(place, item) of the low-rated items, without those whose titles are in `items`."""
    liked = {found.titles[item] for item in items} if len(low_Z) else ()
    pairs = zip(np.searchsorted(own_Y, low_Z).tolist(), item_X[low_Z].tolist(), strict=True)
    named = ((place, found.items[item]) for place, item in pairs)
    return tuple((place, item) for place, item in named if found.titles[item] not in liked)


def _first(user_X: np.ndarray, item_X: np.ndarray) -> np.ndarray:
    """Indices of each (user, item) pair's first interaction, ascending."""
    pair_X = user_X.astype(np.int64) << 32 | item_X
    return np.sort(np.unique(pair_X, return_index=True)[1])


def core(user_X: np.ndarray, item_X: np.ndarray, least: int) -> np.ndarray:
    """Indices of the k-core with k = `least`; each repeated interaction counts.

    Users and items with fewer interactions are dropped repeatedly until none is left.
    """
    kept_X = np.arange(len(user_X))
    while len(kept_X):
        users, items = user_X[kept_X], item_X[kept_X]
        few_X = (np.bincount(users)[users] < least) | (np.bincount(items)[items] < least)
        if not few_X.any():
            break
        kept_X = kept_X[~few_X]
    return kept_X


def _per_user(user_X: np.ndarray, rank_X: np.ndarray) -> dict[int, np.ndarray]:
    """user -> its part of the ascending `rank_X`, with users in the order of their first."""
    if not len(rank_X):
        return {}
    order_X = np.argsort(user_X[rank_X], kind="stable")
    grouped_X = rank_X[order_X]
    parts = np.split(grouped_X, np.flatnonzero(np.diff(user_X[grouped_X])) + 1)
    return {int(user_X[part[0]]): part for part in sorted(parts, key=lambda part: part[0])}


def split_users(sequences: dict[User, UserSequence]) -> Splits:
    """The first int(0.8 n) users train, up to int(0.9 n) val, the rest test (8:1:1)."""
    return {name: dict(part) for name, part in _cut([*sequences.items()]).items()}


def _cut(rows: list) -> dict[str, list]:
    """Cuts rows 8:1:1 into SPLITS."""
    first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
    return dict(zip(SPLITS, (rows[:first], rows[first:second], rows[second:]), strict=True))


def windows(
    sequence: UserSequence, history: int = MAX_HISTORY, least: int = MIN_HISTORY
) -> list[Window]:
    """Every window of a sequence with `least` or more items before its target; no candidates."""
    return [sequence.window(place, history) for place in range(least, len(sequence.items))]


def all_windows(splits: Splits, history: int = MAX_HISTORY, least: int = MIN_HISTORY) -> Windows:
    """Every window of every sequence."""
    return {
        name: [w for sequence in users.values() for w in windows(sequence, history, least)]
        for name, users in splits.items()
    }


def last_windows(splits: Splits, history: int = MAX_HISTORY, least: int = MIN_HISTORY) -> Windows:
    """All windows of train users, the last window of each val and test user.

    `val_all` and `test_all` contain every window of the same val and test users.
    """
    whole = all_windows(splits, history, least)
    last = {name: list({w.user: w for w in rows}.values()) for name, rows in whole.items()}
    return {
        "train": whole["train"],
        "val": last["val"],
        "test": last["test"],
        "val_all": whole["val"],
        "test_all": whole["test"],
    }


def windows_by_time(found: Histories, history: int, least: int) -> Windows:
    """All windows in the order of their targets, the first int(0.8 n) train, … (8:1:1).

    As in D3 and MiniOneRec, a user may be in every split, and nothing in train is later than a
    target of test.
    """
    rows = [
        (rank, window)
        for user, sequence in found.sequences.items()
        for rank, window in zip(
            found.ranks[user][least:].tolist(), windows(sequence, history, least), strict=True
        )
    ]
    rows.sort(key=lambda row: row[0])
    return _cut([window for _, window in rows])


def leave_one_out(sequences: Iterable[UserSequence], history: int, least: int) -> Windows:
    """Per user, the last window is in test, the one before it in val, the others in train."""
    found: Windows = {name: [] for name in SPLITS}
    for sequence in sequences:
        own = windows(sequence, history, least)
        found["train"] += own[:-2]
        found["val"] += own[-2:-1]
        found["test"] += own[-1:]
    return found
