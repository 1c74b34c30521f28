"""Raw interactions as arrays: who had what, when, and how it was rated."""

import dataclasses
from array import array

import numpy as np

from sdpo_jax.data.prepared import User


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Who had what, and when, in the order of the file.

    `users`, `items`: what the numbers in `user_N` and `item_N` (int32) stand for; `rating_N`: None
    where nobody rated; `time_N`: seconds; `count`: how many the source has, those that the reader
    left out too; `untitled`: items and interactions that it left out for want of a title.
    `titles` and `attributes` may have items that nobody had. `source`: file -> SHA-256. `notes`:
    what the reader has to tell, a line each; `rounded`: what tells that times were rounded, or "".
    """

    titles: dict[int, str]
    attributes: dict[int, dict]
    users: list[User]
    items: list[int]
    user_N: np.ndarray
    item_N: np.ndarray
    rating_N: np.ndarray | None
    time_N: np.ndarray
    count: int
    source: dict[str, str]
    untitled: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    rounded: str = ""


class Rows:
    """Interactions while they are read: 24 bytes each, as there may be many millions."""

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
        """What was read; nothing can be added any more."""
        user_N, item_N, rating_N, time_N = (
            np.frombuffer(c, c.typecode) if c else np.array(c) for c in self._columns
        )
        whole = {item: attributes.get(item, {}) for item in titles}
        return Interactions(
            titles,
            whole,
            [*self.users],
            [*self.items],
            user_N,
            item_N,
            rating_N if rated else None,
            time_N,
            count,
            source,
        )
