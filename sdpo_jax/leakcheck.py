"""Tells whether the candidates of a prepared folder give the target away.

    python -m sdpo_jax.leakcheck --dataset=runs/lastfm/data

A look-up that never sees a history is trained on the train split: for each candidate, the most
candidates that a training window with it as the target has in common with this window's; of equals
the more popular. Where candidates are drawn without regard to the target it does no better than
popularity. Beside it, the place in the list that the target has most often in training, and, where
all training sequences follow one order of the items, the candidate that is next in it after the
last of the history: sequences that were sorted by something else than time tell no preference,
however candidates are drawn. Prints one line of JSON with these hit ratios for each other split
(null: there is no such order), and warns where the look-up is clearly above popularity, the place
above chance, the order above popularity, or popularity nearly always right, as when negatives are
items that are never a target.
"""

import graphlib
import json
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from absl import flags

from sdpo_jax.baselines import floor
from sdpo_jax.baselines.arrays import Arrays, arrays, place
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.errors import run_command
from sdpo_jax.evaluation import metrics

MARGIN = 0.05  # of HR@1 above popularity, or chance, that is no accident of the draw
NEARLY_ALWAYS = 0.9
GIVEN_AWAY = (
    "the candidates give the target away; report scores on them only beside scores on independent "
    "ones (sdpo_jax.prepare --candidates=independent)"
)


def leakcheck(dataset: str) -> dict[str, dict[str, Any]]:
    """Per split but train: HR@1 of look-up, place, order and popularity with 95% intervals, n.

    Raises InputError where `dataset` is no prepared folder.
    """
    data = read_dataset(dataset)
    train = arrays(data, data.splits["train"])
    popularity_I = floor.popularity(train.target_N, len(data.titles))
    lookup = Lookup(train, popularity_I)
    usual = np.bincount(places(train)).argmax()
    order_I = one_order(train, len(data.titles))
    found = {}
    for split in list(data.splits)[1:]:
        windows, users = arrays(data, data.splits[split]), [w.user for w in data.splits[split]]
        found[split] = {
            **ratio("lookup", hits_of(lookup.scores, windows), users),
            **ratio("place", [at == usual for at in places(windows)], users),
            **ratio("order", None if order_I is None else in_order(order_I, windows), users),
            **ratio("popularity", hits_of(lambda c: popularity_I[c], windows), users),
            "candidates": windows.candidates_NC.shape[1],
            "n": len(users),
        }
    return found


class Lookup:
    """Scores candidates by the candidates they were shown with when they were the target."""

    def __init__(self, train: Arrays, popularity_I: np.ndarray):
        # The lists of one target lie together: those of item i from first_I[i] to first_I[i + 1].
        order = np.argsort(train.target_N, kind="stable")
        self._shown_NC = train.candidates_NC[order]
        self._first_I = np.searchsorted(train.target_N[order], np.arange(len(popularity_I) + 1))
        self._tie_I = popularity_I / (popularity_I.sum() + 1)  # less than one candidate in common

    def scores(self, candidates_C: np.ndarray) -> np.ndarray:
        """[C], higher for a likelier target."""
        here_I = np.zeros(len(self._tie_I), bool)
        here_I[candidates_C] = True
        common_C = [
            here_I[self._shown_NC[self._first_I[i] : self._first_I[i + 1]]].sum(-1).max(initial=0)
            for i in candidates_C
        ]
        return common_C + self._tie_I[candidates_C]


def places(windows: Arrays) -> list[int]:
    """Where each window's target stands among its candidates."""
    return [
        place(candidates_C, target)
        for candidates_C, target in zip(windows.candidates_NC, windows.target_N, strict=True)
    ]


def one_order(windows: Arrays, items: int) -> np.ndarray | None:
    """Each item's place in an order that all sequences follow, NaN where none holds it, or None."""
    rows_NT = np.column_stack([windows.history_NT, windows.target_N])
    before, after = rows_NT[:, :-1].ravel(), rows_NT[:, 1:].ravel()
    real = before < items  # the padding is not
    sorter = graphlib.TopologicalSorter()
    for a, b in np.unique(np.stack([before[real], after[real]], 1), axis=0).tolist():
        sorter.add(b, a)
    try:
        order = list(sorter.static_order())
    except graphlib.CycleError:
        return None
    order_I = np.full(items + 1, np.nan)  # the last is the padding's, of an empty history
    order_I[order] = range(len(order))
    return order_I


def in_order(order_I: np.ndarray, windows: Arrays) -> list[bool]:
    """Whether the first candidate after the last item of the history is the target."""
    last_N, place_NC = order_I[windows.history_NT[:, -1]], order_I[windows.candidates_NC]
    next_N = np.where(place_NC > last_N[:, None], place_NC, np.inf).min(-1)
    return (order_I[windows.target_N] == next_N).tolist()


def ratio(name: str, hits: Sequence[bool] | None, users: Sequence[Hashable]) -> dict[str, Any]:
    """HR@1 with its interval; None where there are no `hits`."""
    key = f"{name}_hit_ratio_at_1"
    if hits is None:
        return {key: None, f"{key}_ci95": None}
    n, effect = len(hits), metrics.design_effect(hits, users)
    return {key: sum(hits) / n, f"{key}_ci95": metrics.wilson(sum(hits), n, effect)}


def hits_of(scores: Callable[[np.ndarray], np.ndarray], windows: Arrays) -> list[bool]:
    """Whether `scores` of each window's candidates put its target alone at the top."""
    return [
        metrics.target_rank(scores(candidates_C), place(candidates_C, target)) == 1
        for candidates_C, target in zip(windows.candidates_NC, windows.target_N, strict=True)
    ]


def warnings_of(at: dict[str, Any]) -> list[str]:
    """What a split's figures say against its candidates or its sequences."""
    lookup, place, order, popularity = (
        at[f"{name}_hit_ratio_at_1"] for name in ("lookup", "place", "order", "popularity")
    )
    least = {name: at[f"{name}_hit_ratio_at_1_ci95"][0] for name in ("lookup", "place")}
    chance = 1 / at["candidates"]
    told = []
    if least["lookup"] > popularity + MARGIN:
        told.append(f"a look-up that ignores the history is right in {lookup:.3f} of the windows, "
                    f"popularity in {popularity:.3f}: {GIVEN_AWAY}")  # fmt: skip
    if least["place"] > chance + MARGIN:
        told.append(f"the target stands at one place of the list in {place:.3f} of the windows, "
                    f"by chance in {chance:.3f}: {GIVEN_AWAY}")  # fmt: skip
    if popularity > NEARLY_ALWAYS:
        told.append(f"popularity is right in {popularity:.3f} of the windows, so negatives are "
                    f"hardly ever a target in training: {GIVEN_AWAY}")  # fmt: skip
    # Few sequences may have an order by chance, which then tells nothing.
    if order is not None and at["order_hit_ratio_at_1_ci95"][0] > popularity + MARGIN:
        told.append("all training sequences follow one order of the items, so they were not "
                    f"sorted by time, and the next candidate in it is right in {order:.3f} of the "
                    "windows: report scores only beside this one")  # fmt: skip
    return told


def main(argv: Sequence[str]) -> None:
    dataset = flags.FLAGS.dataset
    found = leakcheck(dataset)
    print(json.dumps(found))
    for split, at in found.items():
        for told in warnings_of(at):
            print(f"warning: {dataset}, {split}: {told}", file=sys.stderr)


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "prepared folder", required=True)
    run_command(main)
