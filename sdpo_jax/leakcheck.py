"""Tells whether the candidates of a prepared folder give the target away.

    python -m sdpo_jax.leakcheck --dataset=runs/lastfm/data

A look-up that never sees a history is trained on the train split: for each candidate, the most
candidates that a training window with it as the target has in common with this window's; of equals
the more popular. Where candidates are drawn without regard to the target it does no better than
popularity. Prints one line of JSON with both hit ratios for each other split, and warns where the
look-up is clearly above popularity.
"""

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from sdpo_jax.baselines import floor
from sdpo_jax.baselines.arrays import Arrays, arrays, place
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.errors import run_command
from sdpo_jax.evaluation import metrics

MARGIN = 0.05  # of HR@1 above popularity that is no accident of the draw


def leakcheck(dataset: str) -> dict[str, dict[str, Any]]:
    """Per split but train: HR@1 of the look-up and of popularity, the look-up's 95% interval, n.

    Raises InputError where `dataset` is no prepared folder.
    """
    data = read_dataset(dataset)
    train = arrays(data, data.splits["train"])
    popularity_I = floor.popularity(train.target_N, len(data.titles))
    lookup = Lookup(train, popularity_I)
    found = {}
    for split in list(data.splits)[1:]:
        windows = arrays(data, data.splits[split])
        hits = [hits_of(lookup.scores, windows), hits_of(lambda c: popularity_I[c], windows)]
        n = len(windows.target_N)
        found[split] = {
            "lookup_hit_ratio_at_1": sum(hits[0]) / n,
            "lookup_hit_ratio_at_1_ci95": metrics.wilson(sum(hits[0]), n),
            "popularity_hit_ratio_at_1": sum(hits[1]) / n,
            "n": n,
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


def hits_of(scores: Callable[[np.ndarray], np.ndarray], windows: Arrays) -> list[bool]:
    """Whether `scores` of each window's candidates put its target alone at the top."""
    return [
        metrics.target_rank(scores(candidates_C), place(candidates_C, target)) == 1
        for candidates_C, target in zip(windows.candidates_NC, windows.target_N, strict=True)
    ]


def main(argv: Sequence[str]) -> None:
    dataset = flags.FLAGS.dataset
    found = leakcheck(dataset)
    print(json.dumps(found))
    for split, at in found.items():
        lookup, popularity = at["lookup_hit_ratio_at_1"], at["popularity_hit_ratio_at_1"]
        if at["lookup_hit_ratio_at_1_ci95"][0] > popularity + MARGIN:
            print(
                f"warning: {dataset}, {split}: a look-up that ignores the history is right in "
                f"{lookup:.3f} of the windows, popularity in {popularity:.3f}: the candidates "
                "give the target away; report scores on them only beside scores on independent "
                "ones (sdpo_jax.prepare --candidates=independent)",
                file=sys.stderr,
            )


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "prepared folder", required=True)
    run_command(main)
