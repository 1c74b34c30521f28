"""The random generator of everything that is drawn per example."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, split: str, row: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments.

    `purpose` separates draws: without it the same seed would make the prompt template a
    function of the target's place among the candidates.
    """
    return np.random.default_rng([seed, zlib.crc32(f"{purpose}/{split}".encode()), row])
