"""Items of a catalogue: found by title or id, and filtered by id or attribute."""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sdpo_jax.data.text import plain
from sdpo_jax.system.errors import InputError, brief

NEAREST = 3  # titles that the error about an unknown one lists
# Ids, or a function of an item's attributes (with "id" and "title") that says whether it may come.
Items = Collection[int] | Callable[[dict[str, Any]], bool]


class TitleIndex:
    """Finds items by title or id; `attributes`: further keys of each item."""

    def __init__(self, titles: Mapping[int, str], attributes: Mapping[int, Mapping[str, Any]]):
        self.titles, self.attributes = titles, attributes
        self._by_title: dict[str, int] = {}
        for item, title in titles.items():
            self._by_title.setdefault(title, item)  # of several with one title the first
        self._by_folded: dict[str, int] = {}
        for title, item in self._by_title.items():
            self._by_folded.setdefault(title.casefold(), item)

    def item(self, given: int | str, fuzzy: bool = False) -> int:
        """The item of an id, or of a title in any case; `fuzzy`: the nearest title is taken.

        Raises InputError naming the nearest titles.
        """
        if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
            if int(given) in self.titles:
                return int(given)
            raise InputError(f"history: found id {given}, expected one of the catalogue's items")
        if not isinstance(given, str):
            raise InputError(f"history: found {brief(given)}, expected a title or an integer id")
        title = plain(given)
        found = self.known(title)
        if found is not None:
            return found
        near = self.nearest(title)
        if fuzzy and near:
            return self._by_title[near[0]]
        listed = f": did you mean {', '.join(map(repr, near))}?" if near else ""
        raise InputError(
            f"history: found {brief(given)}, expected a title of the catalogue{listed}"
        )

    def known(self, title: str) -> int | None:
        """The item of a title in any case, or None."""
        return self._by_title.get(title, self._by_folded.get(title.casefold()))

    def nearest(self, title: str, count: int = NEAREST) -> list[str]:
        """The most similar titles, best first."""
        folded = difflib.get_close_matches(title.casefold(), self._by_folded, count, 0.5)
        begins = [t for t in self._by_title if t.casefold().startswith(title.casefold())]
        found = dict.fromkeys([*(self.titles[self._by_folded[t]] for t in folded), *begins])
        return list(found)[:count]

    def search(self, text: str, count: int) -> list[int]:
        """Items whose title contains `text` in any case; those that begin with it come first."""
        folded = plain(text).casefold()
        found = [item for item, title in self.titles.items() if folded in title.casefold()]
        found.sort(key=lambda item: not self.titles[item].casefold().startswith(folded))
        return found[:count]

    def about(self, item: int) -> dict[str, Any]:
        """An item's id, title and attributes."""
        return {"id": item, "title": self.titles[item], **self.attributes.get(item, {})}

    def told_apart(self, items: Sequence[int]) -> list[str]:
        """Their titles; those of one title with their years, or with their ids."""
        titles = [self.titles[item] for item in items]
        years = [self.attributes.get(item, {}).get("year") for item in items]
        return [
            f"{title} ({year or f'id {item}'})" if titles.count(title) > 1 else title
            for item, title, year in zip(items, titles, years, strict=True)
        ]

    def allowed(
        self, items: Items | None = None, where: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """[I]: the items that both filters let through.

        `where`: attribute -> a value, or several of which one is enough; an attribute that is a
        list needs to contain it. Raises InputError for an unknown id or attribute.
        """
        allowed_I = np.ones(len(self.titles), bool)
        if callable(items):
            allowed_I &= np.array([bool(items(self.about(item))) for item in self.titles])
        elif items is not None:
            wanted = set(items)
            if unknown := wanted - set(self.titles):
                found = brief(next(iter(unknown)))
                raise InputError(f"items: found {found}, expected ids of the catalogue")
            allowed_I &= np.array([item in wanted for item in self.titles])
        for key, value in (where or {}).items():
            allowed_I &= self._with_value(key, value)
        return allowed_I

    def _with_value(self, key: str, value: Any) -> np.ndarray:
        known = dict.fromkeys(key for of in self.attributes.values() for key in of)
        if key not in known:
            listed = ", ".join(known) or "none"
            raise InputError(f"where: found {brief(key)}, expected an attribute of items: {listed}")
        wanted = value if isinstance(value, (list, tuple, set)) else [value]

        def matches(found: Any) -> bool:
            values = found if isinstance(found, list) else [found]
            return any(str(w).casefold() == str(v).casefold() for w in wanted for v in values)

        return np.array([matches(self.attributes.get(item, {}).get(key)) for item in self.titles])


def people(history: Sequence[Any]) -> tuple[list[list[int | str]], bool]:
    """Histories of all people, and whether only one person's was given.

    Raises InputError for a text, which would be a history of letters, and for an empty history.
    """
    if isinstance(history, (str, bytes)) or not isinstance(history, Iterable):
        raise InputError(f"history: found {brief(history)}, expected a list of titles or ids")
    listed = list(history)
    several = bool(listed) and all(isinstance(one, (list, tuple)) for one in listed)
    found = [list(one) for one in listed] if several else [listed]
    if any(not one for one in found):
        raise InputError("history: found none, expected one or more titles or ids")
    return found, not several
