"""Chronological sequences, the split by user, and windows (history -> target)."""

from collections.abc import Iterable

from sdpo_jax.data.prepared import User, UserSequence, Window

MIN_HISTORY = 3
MAX_HISTORY = 10
MIN_RATING = 3
SPLITS = ("train", "val", "test")

# (user, item, rating, timestamp)
Interaction = tuple[User, int, float, float]
# split -> user -> sequence
Splits = dict[str, dict[User, UserSequence]]


def by_user(interactions: Iterable[Interaction]) -> dict[User, UserSequence]:
    """user -> items with rating >= 3, by time, each once; users by their first interaction.

    Of several interactions with an item the first counts. What a history shows is never a negative,
    so a later one could be told without a model: the candidate that the history has. Items that the
    user rated lower, and never 3 or more, are the disliked ones.

    The sort is stable. GroupLens shuffled u.data, so ties in time stay in a random order; a
    tie-break by item id would put a pattern into the sequences.
    """
    items: dict[User, dict[int, None]] = {}
    disliked: dict[User, dict[int, int]] = {}  # item -> place
    for user, item, rating, _ in sorted(interactions, key=lambda row: row[3]):
        if rating >= MIN_RATING:
            items.setdefault(user, {})[item] = None
        else:
            disliked.setdefault(user, {}).setdefault(item, len(items.get(user, ())))
    return {
        user: UserSequence(
            user,
            tuple(kept),
            tuple((p, item) for item, p in disliked.get(user, {}).items() if item not in kept),
        )
        for user, kept in items.items()
    }


def split_users(sequences: dict[User, UserSequence]) -> Splits:
    """The first int(0.8 n) users train, up to int(0.9 n) val, the rest test (8:1:1)."""
    users = list(sequences.items())
    first, second = int(0.8 * len(users)), int(0.9 * len(users))
    parts = (users[:first], users[first:second], users[second:])
    return dict(zip(SPLITS, map(dict, parts), strict=True))


def windows(sequence: UserSequence) -> list[Window]:
    """Every window of a sequence with at least 3 items of history; no candidates yet."""
    places = range(MIN_HISTORY, len(sequence.items))
    return [sequence.window(place, MAX_HISTORY) for place in places]


def all_windows(splits: Splits) -> dict[str, list[Window]]:
    """Every window of every sequence."""
    return {
        name: [window for sequence in users.values() for window in windows(sequence)]
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
