"""Llama decoder (Touvron et al. 2023, arXiv 2307.09288): Llama 1/2, SmolLM2.

The decoder does not know how its tokens are laid out: whoever calls it gives each token's
position and the attention, a function of queries, keys and values. Shape letters are declared in
`sdpo_jax.sharding`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.errors import InputError
from sdpo_jax.models.lora import Frozen, Linear, LoraConfig
from sdpo_jax.models.product import product

# What the backward pass computes again: nothing; what is element-wise, while the results of
# products and of attention and the norms' scales are kept, each once; the whole layer; or the whole
# layer with its MLP piece by piece, whose wide arrays then are never all there.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "cheap": jax.checkpoint_policies.save_only_these_names(
        "product", "adapter", "norm", "attention"
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "least": jax.checkpoint_policies.nothing_saveable,
}
PIECES = 8  # of a row's tokens, whose number is a multiple of 8 (`sdpo_jax.data.loader`)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama decoder, named by their shape letters."""

    V: int
    L: int
    D: int
    N: int
    G: int
    H: int
    F: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "DecoderConfig":
        """Reads a Hugging Face `config.json`, old spelling (`rope_theta`) or new.

        Raises:
          InputError: not a Llama, a missing key, or a feature this decoder does not compute.
        """
        if config.get("model_type") != "llama":
            raise InputError(
                f"{where}: model_type is {config.get('model_type')!r}, expected 'llama'"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        for key, found, expected in (
            ("rope_type", kind, "default"),
            ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("attention_bias", config.get("attention_bias", False), False),
            ("mlp_bias", config.get("mlp_bias", False), False),
            ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ):
            if found != expected:
                raise InputError(f"{where}: {key} is {found!r}, this decoder computes {expected!r}")
        try:
            heads, width = config["num_attention_heads"], config["hidden_size"]
            sizes = {
                "V": config["vocab_size"],
                "L": config["num_hidden_layers"],
                "D": width,
                "N": heads,
                "G": config.get("num_key_value_heads") or heads,
                "F": config["intermediate_size"],
            }
            sizes["H"] = config.get("head_dim") or width // heads
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise InputError(
                f"{where}: sizes missing or wrong ({error!r}): is this a full model?"
            ) from None
        wrong = [f"{k}={v!r}" for k, v in sizes.items() if type(v) is not int or v < 1]
        if wrong or sizes["N"] % sizes["G"] or sizes["H"] % 2:
            raise InputError(
                f"{where}: sizes {', '.join(wrong) or sizes} do not make a decoder: expected whole "
                "numbers above 0, heads a multiple of key/value heads, an even head width"
            )
        return cls(
            **sizes,
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tied=config.get("tie_word_embeddings", False),
        )


def rotary(positions_BT: jax.Array, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of RoPE's angles, [B, T, 1, H/2] in float32."""
    exponent = jnp.arange(0, config.H, 2, dtype=jnp.float32) / config.H
    angles = positions_BT[..., None, None] * config.rope_theta**-exponent
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """RoPE in Hugging Face's half-split order."""
    cos, sin = rope
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, -1).astype(x_BTNH.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float, *, dtype):
        self.eps = eps
        self.scale = Frozen(jnp.ones(size, dtype), letters="-")

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        return (x32 * checkpoint_name(inverse, "norm")).astype(x.dtype) * self.scale[...]


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`; its vjp makes no array of their size but the two cotangents."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(residuals, g):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    # Behind a barrier the sigmoid is computed anew, element by element, and never stored.
    gate = jax.lax.optimization_barrier(gate)
    return d_gate, g * gate * jax.nn.sigmoid(gate)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


# (q_BTNH, k_BTGH, v_BTGH, the layer's cache) -> (output [B, T, N*H], what to keep of the layer)
Attention = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig, *, dtype, in_pieces: bool,
                 rngs: nnx.Rngs):  # fmt: skip
        c, self.config, self.in_pieces = config, config, in_pieces
        linear = dict(lora=lora, dtype=dtype, rngs=rngs)
        self.attention_norm = RMSNorm(c.D, c.norm_eps, dtype=dtype)
        self.q = Linear("q", c.D, c.N * c.H, "DN", **linear)
        self.k = Linear("k", c.D, c.G * c.H, "DG", **linear)
        self.v = Linear("v", c.D, c.G * c.H, "DG", **linear)
        self.o = Linear("o", c.N * c.H, c.D, "ND", **linear)
        self.mlp_norm = RMSNorm(c.D, c.norm_eps, dtype=dtype)
        self.gate = Linear("gate", c.D, c.F, "DF", **linear)
        self.up = Linear("up", c.D, c.F, "DF", **linear)
        self.down = Linear("down", c.F, c.D, "FD", **linear)

    def __call__(self, x_BTD, rope, attention: Attention, cache, dropout_key):
        heads = (*x_BTD.shape[:2], -1, self.config.H)
        y = self.attention_norm(x_BTD)
        q_BTNH = rotate(self.q(y, dropout_key).reshape(heads), rope)
        k_BTGH = rotate(self.k(y, dropout_key).reshape(heads), rope)
        v_BTGH = self.v(y, dropout_key).reshape(heads)
        y, kept = attention(q_BTNH, k_BTGH, v_BTGH, cache)
        x_BTD = x_BTD + self.o(y, dropout_key)
        mlp = self.mlp_in_pieces if self.in_pieces else self.mlp
        return x_BTD + mlp(x_BTD, dropout_key), kept

    def mlp(self, x_BTD: jax.Array, dropout_key=None) -> jax.Array:
        y = self.mlp_norm(x_BTD)
        y = swiglu(self.gate(y, dropout_key), self.up(y, dropout_key))
        return self.down(y, dropout_key)

    def mlp_in_pieces(self, x_BTD: jax.Array, dropout_key=None) -> jax.Array:
        """The same for up to PIECES equal runs of tokens, one after the other."""
        B, T, D = x_BTD.shape
        pieces = math.gcd(T, PIECES)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def piece(x_BTD, i):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            return self.mlp(x_BTD, key)

        x_XBTD = x_BTD.reshape(B, pieces, T // pieces, D).swapaxes(0, 1)
        out_XBTD = jax.lax.map(lambda xs: piece(*xs), (x_XBTD, jnp.arange(pieces)))
        return out_XBTD.swapaxes(0, 1).reshape(B, T, D)


class Decoder(nnx.Module):
    """Embedding, L stacked layers under one scan, final norm and (tied or own) head."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig, *, dtype=jnp.float32,
                 remat: str = "none", rngs: nnx.Rngs):  # fmt: skip
        self.config, self.dtype, self.remat = config, dtype, remat
        table = (config.V, config.D)
        self.embedding = Frozen(0.02 * jax.random.normal(rngs.params(), table, dtype), letters="VD")

        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return Layer(config, lora, dtype=dtype, in_pieces=remat == "least", rngs=rngs)

        self.layers = stack(rngs.split(config.L))
        self.norm = RMSNorm(config.D, config.norm_eps, dtype=dtype)
        if not config.tied:
            self.head = Frozen(
                0.02 * jax.random.normal(rngs.params(), table[::-1], dtype), letters="DV"
            )

    def __call__(self, tokens_BT, positions_BT, attention: Attention, cache=None, dropout_key=None):
        """Hidden states after the final norm, [B, T, D], and what `attention` kept, stacked over L.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 positions for RoPE.
          attention: see `Attention`; it holds the masks.
          cache: pytree with leading axis L handed to `attention` layer by layer, or None.
          dropout_key: key of LoRA's dropout, or None for none.
        """
        rope = rotary(positions_BT, self.config)
        graphdef, state = nnx.split(self.layers)

        def body(x_BTD, scanned):
            state, cache, i = scanned
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            return nnx.merge(graphdef, state)(x_BTD, rope, attention, cache, key)

        if self.remat != "none":
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        x_BTD, kept = jax.lax.scan(
            body,
            self.embedding[...][tokens_BT].astype(jnp.float32),
            (state, cache, jnp.arange(self.config.L)),
        )
        return self.norm(x_BTD), kept

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, V] in float32."""
        if self.config.tied:
            return product("btd,vd->btv", hidden, self.embedding[...], self.dtype)
        return product("btd,dv->btv", hidden, self.head[...], self.dtype)
