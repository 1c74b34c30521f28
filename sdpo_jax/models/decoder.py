"""Decoder of any family in `sdpo_jax.models.config`: embedding, stacked layers, norm, head.

The decoder does not know how its tokens are laid out: its caller gives each token's position and
the attention, a function of queries, keys and values. Shape letters are declared in
`sdpo_jax.system.sharding`; X counts pieces of the MLP of Y tokens each, or places.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sdpo_jax.models import llama, neox
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.item_vectors import ItemVectors
from sdpo_jax.models.lora import Frozen, LinearOptions, LoraConfig, fold_in
from sdpo_jax.models.product import product
from sdpo_jax.models.rope import rotary


def fused_attention(primitive, *_, **__) -> bool:
    """A policy that stores the results of cuDNN's attention, which has no names."""
    return primitive.name.startswith("dot_product_attention_fwd")


# What the backward pass recomputes. none: nothing. cheap: element-wise operations; results of
# products and attention and the norms' scales are stored once. full: the whole layer. least: the
# whole layer, with its MLP in pieces, so that its wide arrays never exist whole.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "cheap": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names("product", "adapter", "norm", "attention"),
        fused_attention,
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "least": jax.checkpoint_policies.nothing_saveable,
}
PIECES = 8  # of a row's tokens, whose number is a multiple of 8 (`sdpo_jax.data.loader`)


# (q_BTNH, k_BTGH, v_BTGH, the layer's cache) -> (output [B, T, N*H], the layer's new cache)
Attention = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def mlp_whole(mlp, x_BTD: jax.Array, dropout_keys_W) -> jax.Array:
    return mlp(x_BTD, dropout_keys_W)


def mlp_in_pieces(mlp, x_BTD: jax.Array, dropout_keys_W) -> jax.Array:
    """The same for up to PIECES equal runs of tokens, one after the other in both passes."""
    B, T, D = x_BTD.shape
    pieces = math.gcd(T, PIECES)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def piece(x_BYD, i):
        return mlp(x_BYD, fold_in(dropout_keys_W, i))

    x_XBYD = x_BTD.reshape(B, pieces, T // pieces, D).swapaxes(0, 1)
    out_XBYD = jax.lax.map(lambda xs: piece(*xs), (x_XBYD, jnp.arange(pieces)))
    return out_XBYD.swapaxes(0, 1).reshape(B, T, D)


class Decoder(nnx.Module):
    """Embedding, L stacked layers under one scan, final norm and (tied or own) head."""

    def __init__(
        self,
        config: DecoderConfig,
        lora: LoraConfig,
        *,
        dtype=jnp.float32,
        base_dtype: str = "same",
        remat: str = "none",
        platform: str = "cpu",
        vectors: tuple[int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes random weights.

        Args:
          config: shapes and family.
          lora: what is trained.
          dtype: of products.
          base_dtype: of `quantize.BASE_DTYPES`.
          remat: key of `REMAT`.
          platform: of the devices, which decides what is fast. On CPUs activations are float32,
            since element-wise bfloat16 is slow there. Elsewhere they are in `dtype`. On GPUs
            cuDNN computes the attention within prompts where it can.
          vectors: shape of the item vectors that prompts may hold, or None.
          rngs: of the weights.
        """
        self.config, self.dtype, self.remat = config, dtype, remat
        fits = config.H % 8 == 0 and config.H <= 128
        self.fused = platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16 and fits
        activations = jnp.float32 if platform == "cpu" else dtype
        options = LinearOptions(lora.on(config.projections), dtype, base_dtype, activations)
        family = neox if config.family == "gpt_neox" else llama

        def table(*shape: int) -> jax.Array:
            return 0.02 * jax.random.normal(rngs.params(), shape, options.stored)

        self.embedding = Frozen(table(config.V, config.D), letters="VD")

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return family.Layer(config, options, rngs=rngs)

        self.layers = stack(rngs.split(config.L))
        self.norm = family.norm(config.D, config.norm_eps, dtype=options.stored)
        if not config.tied:
            self.head = Frozen(table(config.D, config.V), letters="DV")
        self.vectors = ItemVectors(vectors, config.D, dtype=dtype, rngs=rngs) if vectors else None

    def __call__(
        self, tokens_BT, positions_BT, attention: Attention, cache=None, dropout_keys_W=None
    ):
        """Hidden states after the final norm, [B, T, D], and the new caches, stacked over L.

        Args:
          tokens_BT: int32 token ids; from V on items, where there are item vectors.
          positions_BT: int32 positions for RoPE.
          attention: see `Attention`; it holds the masks.
          cache: pytree with leading axis L handed to `attention` layer by layer, or None.
          dropout_keys_W: keys of LoRA's dropout, one per row of tokens; None: no dropout.
        """
        angles = rotary(positions_BT, self.config)
        mlp = mlp_in_pieces if self.remat == "least" else mlp_whole
        graphdef, state = nnx.split(self.layers)

        def body(x_BTD, scanned):
            state, cache, i = scanned
            keys_W = fold_in(dropout_keys_W, i)
            return nnx.merge(graphdef, state)(x_BTD, angles, attention, mlp, cache, keys_W)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        x_BTD, kept = jax.lax.scan(
            body,
            self.embed(tokens_BT),
            (state, cache, jnp.arange(self.config.L)),
        )
        return self.norm(x_BTD), kept

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """[B, T, D] in float32."""
        if self.vectors is None:
            return self.embedding[...][tokens_BT].astype(jnp.float32)
        V = self.config.V
        text_BTD = self.embedding[...][jnp.minimum(tokens_BT, V - 1)].astype(jnp.float32)
        item_BTD = self.vectors(jnp.maximum(tokens_BT - V, 0))
        return jnp.where((tokens_BT < V)[..., None], text_BTD, item_BTD)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, V] in float32."""
        if self.config.tied:
            return product("btd,vd->btv", hidden, self.embedding[...], self.dtype)
        return product("btd,dv->btv", hidden, self.head[...], self.dtype)

    def logits_of(self, hidden_BXD: jax.Array, token_X: jax.Array) -> jax.Array:
        """The logit of one token at each place, [B, X] in float32."""
        rows_XD = self.embedding[...][token_X] if self.config.tied else self.head[...].T[token_X]
        return product("bxd,xd->bx", hidden_BXD, rows_XD, self.dtype)
