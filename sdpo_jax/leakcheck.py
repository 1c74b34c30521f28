"""Checks whether the candidates of a prepared folder give the target away.

    python -m sdpo_jax.leakcheck --dataset=runs/lastfm/data

Five rules that know no user's preferences are fitted to the train split and choose a candidate:

- lookup ignores the history. It scores a candidate by the most candidates that this window has in
  common with a training window whose target it is; of equals the more popular wins. If candidates
  are drawn independently of the target, it does no better than popularity.
- place: the place in the list that the target has most often in training.
- order: the next candidate after the history's last item in an order of the items. It is right if
  sequences, or items with equal times, were sorted by something else than time. The order is by
  id, id in the source or title, ascending or descending, or the one that all training sequences
  follow: whichever is right most often in training.
- repeat: the one candidate whose title is in the history, else the most popular.
- popularity.

Prints one line of JSON with their HR@1 for each other split. Warns if lookup, order or repeat are
clearly above popularity, if place is above chance, or if popularity is nearly always right, as when
negatives are items that are never a target.
"""

import graphlib
import json
import re
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from absl import flags

from sdpo_jax.baselines import trivial
from sdpo_jax.baselines.windows import Arrays, arrays, place
from sdpo_jax.data.prepared import Dataset, read_dataset
from sdpo_jax.evaluation import metrics
from sdpo_jax.system.command import run_command

OWN_IDS = ("item", "asin")  # attributes of a CSV file's items and of Amazon's
MARGIN = 0.05  # relevant excess of HR@1 over popularity, or over chance
NEARLY_ALWAYS = 0.9  # HR@1 of popularity
GIVEN_AWAY = (
    "the candidates give the target away; report scores on them only beside scores on independent "
    "ones (sdpo_jax.prepare --candidates=independent)"
)


def leakcheck(dataset: str) -> dict[str, dict[str, Any]]:
    """Per split but train: HR@1 of the five rules with intervals, number of candidates, and n.

    Raises InputError if `dataset` is not a prepared folder.
    """
    data = read_dataset(dataset)
    train = arrays(data, data.splits["train"])
    popularity_I = trivial.popularity(train.target_B, len(data.titles))
    lookup = Lookup(train, popularity_I)
    usual = np.bincount(places(train)).argmax()
    order_I = max(orders(data, train), key=lambda place_I: sum(in_order(place_I, train)))
    title_I = np.unique([*data.titles.values()], return_inverse=True)[1]
    found = {}
    for split in list(data.splits)[1:]:
        windows, users = arrays(data, data.splits[split]), [w.user for w in data.splits[split]]
        found[split] = {
            **ratio("lookup", hits_of(lookup.scores, windows), users),
            **ratio("place", [at == usual for at in places(windows)], users),
            **ratio("order", in_order(order_I, windows), users),
            **ratio("repeat", repeated(title_I, popularity_I, windows), users),
            **ratio("popularity", hits_of(lambda c: popularity_I[c], windows), users),
            "candidates": windows.candidates_BC.shape[1],
            "n": len(users),
        }
    return found


class Lookup:
    """Scores candidates by the candidates they were shown with when they were the target."""

    def __init__(self, train: Arrays, popularity_I: np.ndarray):
        # Lists are sorted by target: those of item i are from first_I[i] to first_I[i + 1].
        order = np.argsort(train.target_B, kind="stable")
        self._shown_BC = train.candidates_BC[order]
        self._first_I = np.searchsorted(train.target_B[order], np.arange(len(popularity_I) + 1))
        self._tie_I = popularity_I / (popularity_I.sum() + 1)  # less than one candidate in common

    def scores(self, candidates_C: np.ndarray) -> np.ndarray:
        """Scores [C] of candidates [C], higher for a likelier target."""
        here_I = np.zeros(len(self._tie_I), bool)
        here_I[candidates_C] = True
        common_C = [
            here_I[self._shown_BC[self._first_I[i] : self._first_I[i + 1]]].sum(-1).max(initial=0)
            for i in candidates_C
        ]
        return common_C + self._tie_I[candidates_C]


def places(windows: Arrays) -> list[int]:
    """The index of each window's target among its candidates."""
    return [
        place(candidates_C, target)
        for candidates_C, target in zip(windows.candidates_BC, windows.target_B, strict=True)
    ]


def orders(data: Dataset, train: Arrays) -> list[np.ndarray]:
    """Orders of the items that sequences may follow instead of time: each item's place, or NaN.

    By id, by id in the source, and by title, each ascending and descending, with numbers in them
    compared as numbers; and the order that all training sequences follow, if there is one. The
    last entry is for the padding of an empty history.
    """
    ids, own = list(data.titles), data.attributes
    keys = [
        {item: item for item in ids},
        {item: _natural(title) for item, title in data.titles.items()},
        *({item: _natural(str(own[item].get(key, ""))) for item in ids} for key in OWN_IDS),
    ]
    known = [sorted(range(len(ids)), key=lambda n: key[ids[n]]) for key in keys]
    places = []
    for order in filter(None, [one_order(train, len(ids)), *known, *(o[::-1] for o in known)]):
        place_I = np.full(len(ids) + 1, np.nan)
        place_I[order] = range(len(order))
        places.append(place_I)
    return places


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts "Film 9" before "Film 10": a whole number with more digits is larger."""
    parts = re.split(r"0*([0-9]+)", text)
    return [(len(part) if n % 2 else 0, part) for n, part in enumerate(parts)]


def one_order(windows: Arrays, items: int) -> list[int] | None:
    """An order that all sequences follow, as a list of items, or None."""
    sequences = np.column_stack([windows.history_BT, windows.target_B])
    before, after = sequences[:, :-1].ravel(), sequences[:, 1:].ravel()
    real = before < items  # without the padding
    sorter = graphlib.TopologicalSorter()
    for a, b in np.unique(np.stack([before[real], after[real]], 1), axis=0).tolist():
        sorter.add(b, a)
    try:
        return list(sorter.static_order())
    except graphlib.CycleError:
        return None


def in_order(order_I: np.ndarray, windows: Arrays) -> list[bool]:
    """Whether the first candidate after the last item of the history is the target."""
    last_B, place_BC = order_I[windows.history_BT[:, -1]], order_I[windows.candidates_BC]
    next_B = np.where(place_BC > last_B[:, None], place_BC, np.inf).min(-1)
    return (order_I[windows.target_B] == next_B).tolist()


def repeated(title_I: np.ndarray, popularity_I: np.ndarray, windows: Arrays) -> list[bool]:
    """Whether the target is the one candidate whose title the history has, else the most popular.

    `title_I`: equal numbers are equal titles.
    """

    def chosen(history_T: np.ndarray, candidates_C: np.ndarray) -> np.ndarray:
        seen_C = np.isin(title_I[candidates_C], title_I[history_T[history_T < len(title_I)]])
        return seen_C if seen_C.sum() == 1 else popularity_I[candidates_C]

    rows = zip(windows.history_BT, windows.candidates_BC, windows.target_B, strict=True)
    return [
        metrics.target_rank(chosen(history_T, candidates_C), place(candidates_C, target)) == 1
        for history_T, candidates_C, target in rows
    ]


def ratio(name: str, hits: Sequence[bool], users: Sequence[Hashable]) -> dict[str, Any]:
    """HR@1 with its interval."""
    key = f"{name}_hit_ratio_at_1"
    n, effect = len(hits), metrics.design_effect(hits, users)
    return {key: sum(hits) / n, f"{key}_ci95": metrics.wilson(sum(hits), n, effect)}


def hits_of(scores: Callable[[np.ndarray], np.ndarray], windows: Arrays) -> list[bool]:
    """Whether `scores` of each window's candidates put its target alone at the top."""
    return [
        metrics.target_rank(scores(candidates_C), place(candidates_C, target)) == 1
        for candidates_C, target in zip(windows.candidates_BC, windows.target_B, strict=True)
    ]


def warnings_of(at: dict[str, Any]) -> list[str]:
    """Warnings about the candidates or the sequences of a split, from its figures."""
    names = ("lookup", "place", "order", "repeat", "popularity")
    lookup, place, order, repeat, popularity = (at[f"{name}_hit_ratio_at_1"] for name in names)
    least = {name: at[f"{name}_hit_ratio_at_1_ci95"][0] for name in names}
    chance = 1 / at["candidates"]
    messages = []
    if least["lookup"] > popularity + MARGIN:
        messages.append(
            f"a look-up that ignores the history is right in {lookup:.3f} of the windows, "
            f"popularity in {popularity:.3f}: {GIVEN_AWAY}"
        )
    if least["place"] > chance + MARGIN:
        messages.append(
            f"the target is at one place of the list in {place:.3f} of the windows, "
            f"by chance in {chance:.3f}: {GIVEN_AWAY}"
        )
    if popularity > NEARLY_ALWAYS:
        messages.append(
            f"popularity is right in {popularity:.3f} of the windows, so negatives are "
            f"hardly ever a target in training: {GIVEN_AWAY}"
        )
    if least["order"] > popularity + MARGIN:
        messages.append(
            "training sequences follow one order of the items, so they were not sorted by "
            f"time alone, and the next candidate in it is right in {order:.3f} of the "
            "windows: report scores only beside this one"
        )
    if least["repeat"] > popularity + MARGIN:
        messages.append(
            "the candidate with the same title as an item of the history, else the most "
            f"popular, is right in {repeat:.3f} of the windows, popularity in "
            f"{popularity:.3f}: report scores only beside this one"
        )
    return messages


def main(argv: Sequence[str]) -> None:
    dataset = flags.FLAGS.dataset
    found = leakcheck(dataset)
    print(json.dumps(found))
    for split, at in found.items():
        for message in warnings_of(at):
            print(f"warning: {dataset}, {split}: {message}", file=sys.stderr)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "prepared folder", required=True)
    run_command(main)
