"""The predictions of an evaluation: one line of JSON per window."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdpo_jax.data.prepared import Window

Prediction = dict[str, Any]
LISTED = 10  # items of a ranking over the catalogue in a prediction, and in coverage_at_10


def about(row: int, window: Window, titles: Mapping[int, str]) -> Prediction:
    """The keys of every prediction; `titles`: of all items by id."""
    return {"row": row, "user": window.user, "target": titles[window.target]}


def generated(text: str, chosen: int | None, target: int) -> Prediction:
    """Of an answer as text; `chosen`: the candidate that it names, None where it is invalid."""
    return {"generation": text, "valid": chosen is not None, "hit": chosen == target}


def ranked(
    items: Sequence[int],
    scores: Sequence[float] | np.ndarray,
    titles: Mapping[int, str],
    rank: int | None,
    *,
    catalogue: bool = False,
) -> Prediction:
    """Of a ranking: `items` by id, the best first, their scores, and the target's `rank`.

    Over the catalogue, `top` has the ids, for coverage, Gini index and mean popularity.
    """
    return {
        "ranked": [[titles[i], round(float(x), 4)] for i, x in zip(items, scores, strict=True)],
        **({"top": list(items)} if catalogue else {}),
        "rank": rank,
        "valid": True,
        "hit": rank == 1,
    }
