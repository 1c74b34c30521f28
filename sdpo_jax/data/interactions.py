"""Raw interactions as arrays: user, item, rating and time."""

import dataclasses
from array import array

import numpy as np

from sdpo_jax.data.prepared import User


@dataclasses.dataclass(frozen=True)
class Interactions:
    """X interactions in file order.

    `users`, `items`: ids, indexed by `user_X` and `item_X` (int32). `rating_X`: None for a source
    without ratings. `time_X`: seconds, or the source's own unit. `count`: interactions in the
    source, including those that the reader left out. `untitled`: items, and interactions, left out
    for lack of a title. `titles`, `attributes`: by item id, also of items without interactions.
    `source`: file -> SHA-256. `notes`: the reader's notes to the user, one line each. `rounded`:
    the message that times were rounded, or "".
    """

    titles: dict[int, str]
    attributes: dict[int, dict]
    users: list[User]
    items: list[int]
    user_X: np.ndarray
    item_X: np.ndarray
    rating_X: np.ndarray | None
    time_X: np.ndarray
    count: int
    source: dict[str, str]
    untitled: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    rounded: str = ""


class Rows:
    """Collects interactions in 24 bytes each, as a source may have many millions."""

    def __init__(self):
        self.users: dict[User, int] = {}
        self.items: dict[int, int] = {}
        self._columns: tuple[array, ...] = array("i"), array("i"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self._columns[0])

    def add(self, user: User, item: int, rating: float, seconds: float) -> None:
        users, items = self.users, self.items
        row = (users.setdefault(user, len(users)), items.setdefault(item, len(items)))
        for column, value in zip(self._columns, (*row, rating, seconds), strict=True):
            column.append(value)

    def done(
        self,
        titles: dict[int, str],
        attributes: dict[int, dict],
        count: int,
        source: dict[str, str],
        *,
        rated: bool = True,
    ) -> Interactions:
        """The interactions as views of the columns, after which none can be added."""
        user_X, item_X, rating_X, time_X = (
            np.frombuffer(c, c.typecode) if c else np.array(c) for c in self._columns
        )
        whole = {item: attributes.get(item, {}) for item in titles}
        return Interactions(
            titles,
            whole,
            [*self.users],
            [*self.items],
            user_X,
            item_X,
            rating_X if rated else None,
            time_X,
            count,
            source,
        )
