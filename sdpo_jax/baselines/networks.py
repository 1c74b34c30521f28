"""Shared by the networks: item vectors, and dropout that is off without `rngs`.

A network is a Flax NNX module, made by `Network(items, rngs=rngs)` or, if its `__init__` has T, the
longest history, by `Network(items, T=T, rngs=rngs)`. `network(history_BT, rngs)` scores all items,
[B, I]; histories are left-padded with I, and `rngs` are given in training only.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

SIZE = 64  # D


class Vectors(Protocol):
    """A module that returns a vector per item, [I, D]."""

    def vectors(self) -> jax.Array: ...


class Items(nnx.Module):
    """A learned vector per item, [I, D]."""

    def __init__(self, items: int, size: int = SIZE, *, rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (items, size)) * size**-0.5)

    def vectors(self) -> jax.Array:
        return self.table[...]


def embed(vectors_ID: jax.Array, history_BT: jax.Array) -> jax.Array:
    """The vectors of a history, [B, T, D]; zero at padding."""
    return jnp.take(vectors_ID, history_BT, axis=0, mode="fill", fill_value=0)


def dropout(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Dropout in training, where `rngs` are given."""
    return nnx.Dropout(rate, deterministic=rngs is None)(x, rngs=rngs)
