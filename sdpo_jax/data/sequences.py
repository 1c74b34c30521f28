"""Chronological sequences, the split by user, and windows (history -> target)."""

from collections.abc import Iterable, Sequence

from sdpo_jax.data.prepared import Window

MIN_HISTORY = 3
MAX_HISTORY = 10
MIN_RATING = 3
SPLITS = ("train", "val", "test")

# (user, item, rating, timestamp)
Interaction = tuple[int, int, float, float]


def by_user(interactions: Iterable[Interaction]) -> dict[int, list[int]]:
    """user -> item ids with rating >= 3, by time; users by their first such interaction.

    The sort is stable. GroupLens shuffled u.data, so ties in time stay in a random order; a
    tie-break by item id would put a pattern into the sequences.
    """
    kept = [row for row in interactions if row[2] >= MIN_RATING]
    sequences: dict[int, list[int]] = {}
    for user, item, _, _ in sorted(kept, key=lambda row: row[3]):
        sequences.setdefault(user, []).append(item)
    return sequences


def split_users(users: Sequence[int]) -> dict[str, list[int]]:
    """The first int(0.8 n) users train, up to int(0.9 n) val, the rest test (8:1:1)."""
    users = list(users)
    first, second = int(0.8 * len(users)), int(0.9 * len(users))
    return {"train": users[:first], "val": users[first:second], "test": users[second:]}


def windows(user: int, sequence: Sequence[int]) -> list[Window]:
    """Every window of a sequence with at least 3 items of history; no candidates yet."""
    return [
        Window(user, tuple(sequence[max(0, t - MAX_HISTORY) : t]), (), sequence[t])
        for t in range(MIN_HISTORY, len(sequence))
    ]


def movielens_windows(sequences: dict[int, list[int]]) -> dict[str, list[Window]]:
    """All windows of train users, the last one of each val and test user.

    `val_all` and `test_all` hold every window of the same val and test users.
    """
    splits = {
        name: [windows(user, sequences[user]) for user in users]
        for name, users in split_users(list(sequences)).items()
    }
    whole = {name: [w for user in users for w in user] for name, users in splits.items()}
    last = {name: [user[-1] for user in users if user] for name, users in splits.items()}
    return {
        "train": whole["train"],
        "val": last["val"],
        "test": last["test"],
        "val_all": whole["val"],
        "test_all": whole["test"],
    }


def lastfm_windows(sequences: dict[str, list[list[int]]]) -> dict[str, list[Window]]:
    """Every window of every sequence; users are numbered through train, val, test."""
    splits, user = {}, 0
    for name in SPLITS:
        splits[name] = []
        for sequence in sequences[name]:
            splits[name] += windows(user, sequence)
            user += 1
    return splits
