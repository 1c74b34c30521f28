"""Chronological sequences, their split, and windows (history -> target)."""

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
    """`sequences`: of users in the order of their first item.

    `ranks`: user -> for each item of the sequence its place among all interactions by time.
    `tied`: user -> the share of its neighbours in the sequence that have one time.
    """

    sequences: dict[User, UserSequence]
    ranks: dict[User, np.ndarray]
    tied: dict[User, float]


def by_user(found: Interactions, *, rated: bool, repeats: bool, least: int, seed: int) -> Histories:
    """Every user's items by time.

    Args:
      found: the interactions.
      rated: ratings below 3 are no items of a sequence but its disliked ones, if the user never
        rated the item, or one of the same title, 3 or more.
      repeats: a user may have an item several times; otherwise the first counts. What a history
        shows is never a negative, so a later one could be told without a model: the candidate that
        the history has.
      least: users and items with fewer interactions are dropped until there are none.
      seed: of the order of interactions with one time, which is drawn: that of a file, often by
        item, would put a pattern into the sequences that a model learns and no taste has.
    """
    order_N = _in_time(found, seed)
    user_N, item_N = found.user_N[order_N], found.item_N[order_N]
    liked_N = np.ones(len(order_N), bool)
    if rated and found.rating_N is not None:
        liked_N = found.rating_N[order_N] >= MIN_RATING
    rank_N = np.flatnonzero(liked_N)
    if not repeats:
        rank_N = rank_N[_first(user_N[rank_N], item_N[rank_N])]
    rank_N = rank_N[core(user_N[rank_N], item_N[rank_N], least)]
    low_N = np.flatnonzero(~liked_N)
    if least > 1:
        low_N = low_N[np.isin(item_N[low_N], item_N[rank_N])]
    low_N = low_N[_first(user_N[low_N], item_N[low_N])]
    ranks, low = _per_user(user_N, rank_N), _per_user(user_N, low_N)
    sequences, tied, time_N = {}, {}, found.time_N[order_N]
    for user, own in ranks.items():
        items = [found.items[item] for item in item_N[own].tolist()]
        disliked = _disliked(found, items, own, item_N, low.get(user, own[:0]))
        sequences[found.users[user]] = UserSequence(found.users[user], tuple(items), disliked)
        if len(own) > 1:
            tied[found.users[user]] = float((np.diff(time_N[own]) == 0).mean())
    return Histories(sequences, {found.users[user]: own for user, own in ranks.items()}, tied)


def _in_time(found: Interactions, seed: int) -> np.ndarray:
    """Places of all interactions by time; of those with one time in an order that is drawn.

    The draw is a function of (seed, user, title), so neither the order nor further lines of a file
    change it.
    """
    order_N = np.argsort(found.time_N, kind="stable")
    tied_N = np.zeros(len(order_N), bool)
    tied_N[1:] = np.diff(found.time_N[order_N]) == 0
    tied_N[:-1] |= tied_N[1:]
    drawn_N = np.zeros(len(order_N), np.uint64)
    for place in order_N[tied_N].tolist():
        user, item = found.users[found.user_N[place]], found.items[found.item_N[place]]
        key = f"{seed}/{user}/{found.titles[item]}".encode("utf-8", "surrogatepass")
        drawn_N[place] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
    return np.lexsort((drawn_N, found.time_N))


def _disliked(
    found: Interactions, items: list[int], own_T: np.ndarray, item_N: np.ndarray, low_D: np.ndarray
) -> tuple[tuple[int, int], ...]:
    liked = {found.titles[item] for item in items} if len(low_D) else ()
    pairs = zip(np.searchsorted(own_T, low_D).tolist(), item_N[low_D].tolist(), strict=True)
    named = ((place, found.items[item]) for place, item in pairs)
    return tuple((place, item) for place, item in named if found.titles[item] not in liked)


def _first(user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
    """Places of each pair's first interaction, ascending."""
    pair_N = user_N.astype(np.int64) << 32 | item_N
    return np.sort(np.unique(pair_N, return_index=True)[1])


def core(user_N: np.ndarray, item_N: np.ndarray, least: int) -> np.ndarray:
    """Places of what stays when users and items with fewer than `least` are dropped until none is.

    The k-core; repeated interactions count each.
    """
    kept_N = np.arange(len(user_N))
    while len(kept_N):
        users, items = user_N[kept_N], item_N[kept_N]
        few_N = (np.bincount(users)[users] < least) | (np.bincount(items)[items] < least)
        if not few_N.any():
            break
        kept_N = kept_N[~few_N]
    return kept_N


def _per_user(user_N: np.ndarray, rank_N: np.ndarray) -> dict[int, np.ndarray]:
    """user -> its part of the ascending `rank_N`; users by their first."""
    if not len(rank_N):
        return {}
    order_N = np.argsort(user_N[rank_N], kind="stable")
    grouped_N = rank_N[order_N]
    parts = np.split(grouped_N, np.flatnonzero(np.diff(user_N[grouped_N])) + 1)
    return {int(user_N[part[0]]): part for part in sorted(parts, key=lambda part: part[0])}


def split_users(sequences: dict[User, UserSequence]) -> Splits:
    """The first int(0.8 n) users train, up to int(0.9 n) val, the rest test (8:1:1)."""
    return {name: dict(part) for name, part in _cut([*sequences.items()]).items()}


def _cut(rows: list) -> dict[str, list]:
    """8:1:1."""
    first, second = int(0.8 * len(rows)), int(0.9 * len(rows))
    return dict(zip(SPLITS, (rows[:first], rows[first:second], rows[second:]), strict=True))


def windows(
    sequence: UserSequence, history: int = MAX_HISTORY, least: int = MIN_HISTORY
) -> list[Window]:
    """Every window of a sequence with at least `least` items before it; no candidates yet."""
    places = range(least, len(sequence.items))
    return [sequence.window(place, history) for place in places]


def all_windows(splits: Splits, history: int = MAX_HISTORY, least: int = MIN_HISTORY) -> Windows:
    """Every window of every sequence."""
    return {
        name: [w for sequence in users.values() for w in windows(sequence, history, least)]
        for name, users in splits.items()
    }


def last_windows(splits: Splits, history: int = MAX_HISTORY, least: int = MIN_HISTORY) -> Windows:
    """All windows of train users, the last one of each val and test user.

    `val_all` and `test_all` hold every window of the same val and test users.
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

    As D3 and MiniOneRec: a user may be in every split, and nothing of training is later than a
    target of the test.
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
    """Of each user the last window is for the test, the one before it for val, the rest train."""
    found: Windows = {name: [] for name in SPLITS}
    for sequence in sequences:
        own = windows(sequence, history, least)
        found["train"] += own[:-2]
        found["val"] += own[-2:-1]
        found["test"] += own[-1:]
    return found
