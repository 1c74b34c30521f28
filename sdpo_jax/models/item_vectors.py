"""Vectors of a trained recommender as tokens of a prompt: LLaRA's hybrid prompts.

Liao et al., "LLaRA: Large Language-Recommendation Assistant", SIGIR 2024, arXiv 2312.02445,
sections 3.1 and 3.2. A token id from V on is an item; V is the vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open

from sdpo_jax.data.prepared import Dataset
from sdpo_jax.models.lora import Frozen
from sdpo_jax.models.product import product
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.sharding import shard_whole, to_host

ITEMS = "items/table/value"  # a stored network's tensor of one vector per item


class ItemVectors(nnx.Module):
    """The frozen vectors [I, E] of a recommender, and a trained network of two layers to [D]."""

    def __init__(self, shape: tuple[int, int], size: int, *, dtype, rngs: nnx.Rngs):
        items, width = shape
        self.dtype = dtype

        def weights(size_in: int, scale: float) -> nnx.LoRAParam:
            drawn = jax.random.normal(rngs.params(), (size_in, size)) * scale * size_in**-0.5
            return nnx.LoRAParam(drawn, letters="EE")

        # Both set by `fill`. E: a letter that no mesh shards, here and below.
        self.vectors = Frozen(jnp.zeros((items, width)), letters="IE")
        self.token_rms = Frozen(jnp.ones(1), letters="E")
        # Of the adapter's kind, to be trained and stored with it. GELU's output has a mean square
        # of 0.425 for standard normal input, so an item starts as long as a token's embedding.
        self.inner, self.outer = weights(width, 1.0), weights(size, 0.425**-0.5)
        self.inner_bias = nnx.LoRAParam(jnp.zeros(size), letters="E")
        self.outer_bias = nnx.LoRAParam(jnp.zeros(size), letters="E")

    def __call__(self, item_BT: jax.Array) -> jax.Array:
        """[B, T, D]"""
        vectors_BTE = self.vectors[...][item_BT].astype(jnp.float32)
        x_BTD: Any = product("bte,ed->btd", vectors_BTE, self.inner[...], self.dtype)
        x_BTD = jax.nn.gelu(x_BTD + self.inner_bias[...])
        x_BTD = product("btd,de->bte", x_BTD, self.outer[...], self.dtype)
        return self.token_rms[...] * (x_BTD + self.outer_bias[...])


def fill(base: Any, vectors_IE: np.ndarray, place: Callable) -> None:
    """Puts a recommender's vectors into a decoder's base, scaled to a root mean square of 1.

    Their length depends on the recommender's training; the start of ours should not.
    """
    rms = float(np.sqrt(np.mean(np.square(vectors_IE, dtype=np.float64))))
    found = {
        "vectors": np.asarray(vectors_IE / rms, np.float32),
        "token_rms": to_host(_rms(base["embedding"].get_value())[None]),
    }
    for name, value in found.items():
        variable = base["vectors"][name]
        variable.set_value(shard_whole(value, place(variable)))


@jax.jit
def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def read_item_vectors(path: str, dataset: Dataset) -> np.ndarray | None:
    """The vectors [I, E] of a stored network's items; None for the path "".

    Raises InputError where there are none, or those of another data set.
    """
    if not path:
        return None
    items, fingerprint = len(dataset.titles), dataset.meta["fingerprint"]
    expected = "expected a network that sdpo_jax.baselines kept for this data set"
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("dataset") != fingerprint:
                raise InputError(f"{path}: found one of another data set, {expected}: train it")
            vectors_IE = file.get_tensor(ITEMS)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: found {error}, {expected}: train --model=sasrec") from error
    if vectors_IE.ndim != 2 or len(vectors_IE) != items or vectors_IE.dtype != np.float32:
        raise InputError(f"{path}: found vectors {vectors_IE.shape}, expected {items} of float32")
    if not np.isfinite(vectors_IE).all() or not vectors_IE.any():
        raise InputError(
            f"{path}: found vectors that are zeros or no numbers, {expected}: train it again"
        )
    return vectors_IE
