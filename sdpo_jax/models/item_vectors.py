"""Vectors of a trained recommender as tokens of a prompt: LLaRA's hybrid prompts.

Liao et al., "LLaRA: Large Language-Recommendation Assistant", SIGIR 2024, arXiv 2312.02445,
sections 3.1 and 3.2. A token id from V on is an item; V is the vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sdpo_jax.models.lora import Frozen
from sdpo_jax.models.product import product
from sdpo_jax.sharding import fetch, put_whole


class ItemVectors(nnx.Module):
    """The frozen vectors [I, E] of a recommender, and a trained network of two layers to [D]."""

    def __init__(self, shape: tuple[int, int], size: int, *, dtype, rngs: nnx.Rngs):
        items, width = shape
        self.dtype = dtype

        def weights(size_in: int, scale: float) -> nnx.LoRAParam:
            drawn = jax.random.normal(rngs.params(), (size_in, size)) * scale * size_in**-0.5
            return nnx.LoRAParam(drawn, letters="EE")

        # Both set by `fill`. No letter that a mesh would cut, here and below.
        self.vectors = Frozen(jnp.zeros((items, width)), letters="IE")
        self.token_rms = Frozen(jnp.ones(1), letters="E")
        # Trained and kept with the adapter, hence of its kind. GELU's output has a mean square of
        # 0.425 for standard normal input, so at first an item is as long as a token's embedding.
        self.inner, self.outer = weights(width, 1.0), weights(size, 0.425**-0.5)
        self.inner_bias = nnx.LoRAParam(jnp.zeros(size), letters="E")
        self.outer_bias = nnx.LoRAParam(jnp.zeros(size), letters="E")

    def __call__(self, item_BT: jax.Array) -> jax.Array:
        """[B, T, D]"""
        vectors_BTE = self.vectors[...][item_BT].astype(jnp.float32)
        x_BTD = product("bte,ed->btd", vectors_BTE, self.inner[...], self.dtype)
        x_BTD = jax.nn.gelu(x_BTD + self.inner_bias[...])
        x_BTD = product("btd,de->bte", x_BTD, self.outer[...], self.dtype) + self.outer_bias[...]
        return self.token_rms[...] * x_BTD


def fill(base: nnx.State, vectors_IE: np.ndarray, place: Callable) -> None:
    """Puts a recommender's vectors into a decoder's base, scaled to a root mean square of 1.

    How long they are depends on the recommender's training; the network's start should not.
    """
    rms = float(np.sqrt(np.mean(np.square(vectors_IE, dtype=np.float64))))
    found = {
        "vectors": np.asarray(vectors_IE / rms, np.float32),
        "token_rms": fetch(_rms(base["embedding"].get_value())[None]),
    }
    for name, value in found.items():
        variable = base["vectors"][name]
        variable.set_value(put_whole(value, place(variable)))


@jax.jit
def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
