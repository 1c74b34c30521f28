"""Subsets of the rows of a split."""

import numpy as np


def evenly_spaced(n: int, limit: int = 0) -> list[int]:
    """`limit` row numbers evenly spaced from the first to the last of n; all if limit is 0."""
    if not 0 < limit < n:
        return list(range(n))
    return [int(i) for i in np.linspace(0, n - 1, limit).round()]
