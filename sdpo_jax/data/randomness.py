"""The one source of randomness for everything drawn per example."""

import zlib

import numpy as np


def generator(seed: int, purpose: str, split: str, row: int) -> np.random.Generator:
    """A generator that is a pure function of its arguments.

    `purpose` keeps draws apart: without it the same seed would make the prompt template a
    function of the target's place among the candidates.
    """
    return np.random.default_rng([seed, zlib.crc32(f"{purpose}/{split}".encode()), row])
