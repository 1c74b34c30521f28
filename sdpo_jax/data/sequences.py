"""Chronological sequences, the split by user, and windows (history -> target)."""

from collections.abc import Iterable, Sequence

from sdpo_jax.data.prepared import Window

MIN_HISTORY = 3
MAX_HISTORY = 10
MIN_RATING = 3
SPLITS = ("train", "val", "test")

User = int | str
# (user, item, rating, timestamp)
Interaction = tuple[User, int, float, float]
# split -> user -> item ids, oldest first
Splits = dict[str, dict[User, list[int]]]


def by_user(interactions: Iterable[Interaction]) -> dict[User, list[int]]:
    """user -> item ids with rating >= 3, by time, each once; users by their first interaction.

    Of several interactions with an item the first counts. What a history shows is never a negative,
    so a later one could be told without a model: the candidate that the history has.

    The sort is stable. GroupLens shuffled u.data, so ties in time stay in a random order; a
    tie-break by item id would put a pattern into the sequences.
    """
    kept = [row for row in interactions if row[2] >= MIN_RATING]
    sequences: dict[User, dict[int, None]] = {}
    for user, item, _, _ in sorted(kept, key=lambda row: row[3]):
        sequences.setdefault(user, {})[item] = None
    return {user: list(items) for user, items in sequences.items()}


def split_users(sequences: dict[User, list[int]]) -> Splits:
    """The first int(0.8 n) users train, up to int(0.9 n) val, the rest test (8:1:1)."""
    users = list(sequences.items())
    first, second = int(0.8 * len(users)), int(0.9 * len(users))
    parts = (users[:first], users[first:second], users[second:])
    return dict(zip(SPLITS, map(dict, parts), strict=True))


def windows(user: User, sequence: Sequence[int]) -> list[Window]:
    """Every window of a sequence with at least 3 items of history; no candidates yet."""
    return [
        Window(user, tuple(sequence[max(0, t - MAX_HISTORY) : t]), (), sequence[t])
        for t in range(MIN_HISTORY, len(sequence))
    ]


def all_windows(splits: Splits) -> dict[str, list[Window]]:
    """Every window of every sequence."""
    return {
        name: [window for user in users for window in windows(user, users[user])]
        for name, users in splits.items()
    }


def last_windows(splits: Splits) -> dict[str, list[Window]]:
    """All windows of train users, the last one of each val and test user.

    `val_all` and `test_all` hold every window of the same val and test users.
    """
    whole = all_windows(splits)
    last = {name: list({w.user: w for w in rows}.values()) for name, rows in whole.items()}
    return {
        "train": whole["train"],
        "val": last["val"],
        "test": last["test"],
        "val_all": whole["val"],
        "test_all": whole["test"],
    }
