"""Scores that any recommender must beat: popularity, and random ones."""

import numpy as np

from sdpo_jax.data.randomness import generator


def popularity(target_B: np.ndarray, items: int) -> np.ndarray:
    """How often each item is the target of a training window, [I]."""
    return np.bincount(target_B, minlength=items).astype(np.float32)


def random_scores(seed: int, split: str, rows, items: int) -> np.ndarray:
    """Uniform scores of every item for each of `rows`, a pure function of the arguments, [B, I]."""
    return np.stack([generator(seed, "random", split, r).random(items, np.float32) for r in rows])
