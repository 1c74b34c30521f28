"""Vectors of a trained recommender as tokens of a prompt: LLaRA's hybrid prompts.

Liao et al., "LLaRA: Large Language-Recommendation Assistant", SIGIR 2024, arXiv 2312.02445,
sections 3.1 and 3.2. A token id from V on is an item; V is the vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sdpo_jax.models.lora import Frozen
from sdpo_jax.models.product import product


class ItemVectors(nnx.Module):
    """The frozen vectors [I, E] of a recommender, and a trained network of two layers to [D]."""

    def __init__(self, shape: tuple[int, int], size: int, *, dtype, rngs: nnx.Rngs):
        items, width = shape
        self.dtype = dtype

        def weights(size_in: int, scale: float) -> nnx.LoRAParam:
            drawn = jax.random.normal(rngs.params(), (size_in, size)) * scale * size_in**-0.5
            return nnx.LoRAParam(drawn, letters="EE")

        self.vectors = Frozen(jnp.zeros((items, width)), letters="IE")
        # Trained and kept with the adapter, hence of its kind. No letter that a mesh would cut.
        # At first an item is about as long as a token's embedding.
        self.inner, self.outer = weights(width, 1.0), weights(size, 0.02)
        self.inner_bias = nnx.LoRAParam(jnp.zeros(size), letters="E")
        self.outer_bias = nnx.LoRAParam(jnp.zeros(size), letters="E")

    def __call__(self, item_BT: jax.Array) -> jax.Array:
        """[B, T, D]"""
        vectors_BTE = self.vectors[...][item_BT].astype(jnp.float32)
        x_BTD = product("bte,ed->btd", vectors_BTE, self.inner[...], self.dtype)
        x_BTD = jax.nn.gelu(x_BTD + self.inner_bias[...])
        return product("btd,de->bte", x_BTD, self.outer[...], self.dtype) + self.outer_bias[...]
