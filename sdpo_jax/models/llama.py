"""The layer of Llama (Touvron et al. 2023, arXiv 2307.09288) and its kin: Mistral, Qwen2, Qwen3.

They differ in biases, in norms of queries and keys, and in how far attention looks back, which the
caller masks.
"""

import jax
from flax import nnx

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import Linear, LinearOptions, together
from sdpo_jax.models.norms import RMSNorm
from sdpo_jax.models.rope import rotate

norm = RMSNorm  # after the last layer as well


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`silu(gate) * up`; its vjp makes no array of their size but the two cotangents."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(residuals, g):
    gate, up = residuals
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    # Behind a barrier the sigmoid is recomputed, element by element, and never stored.
    gate = jax.lax.optimization_barrier(gate)
    return d_gate, g * gate * jax.nn.sigmoid(gate)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: DecoderConfig, options: LinearOptions, *, rngs: nnx.Rngs):
        c, self.config = config, config

        def linear(name: str, size_in: int, size_out: int, letters: str, bias: bool) -> Linear:
            return Linear(name, size_in, size_out, letters, options, bias=bias, rngs=rngs)

        def norm(size: int) -> RMSNorm:
            return RMSNorm(size, c.norm_eps, dtype=options.stored, out=options.activations)

        self.attention_norm = norm(c.D)
        self.q = linear("q", c.D, c.N * c.H, "DN", c.qkv_bias)
        self.k = linear("k", c.D, c.G * c.H, "DG", c.qkv_bias)
        self.v = linear("v", c.D, c.G * c.H, "DG", c.qkv_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = norm(c.H), norm(c.H)
        self.o = linear("o", c.N * c.H, c.D, "ND", c.o_bias)
        self.mlp_norm = norm(c.D)
        self.gate = linear("gate", c.D, c.F, "DF", c.mlp_bias)
        self.up = linear("up", c.D, c.F, "DF", c.mlp_bias)
        self.down = linear("down", c.F, c.D, "FD", c.mlp_bias)

    def __call__(self, x_BTD, angles, attention, mlp, cache, dropout_keys_W):
        """`mlp` calls the function that it is given, at once or piece by piece."""
        heads = (*x_BTD.shape[:2], -1, self.config.H)
        y = self.attention_norm(x_BTD)
        qkv = together((self.q, self.k, self.v), y, dropout_keys_W)
        q_BTNH, k_BTGH, v_BTGH = (x.reshape(heads) for x in qkv)
        if self.config.qk_norm:
            q_BTNH, k_BTGH = self.q_norm(q_BTNH), self.k_norm(k_BTGH)
        y, kept = attention(rotate(q_BTNH, angles), rotate(k_BTGH, angles), v_BTGH, cache)
        x_BTD = x_BTD + self.o(y, dropout_keys_W)
        return x_BTD + mlp(self.mlp, x_BTD, dropout_keys_W), kept

    def mlp(self, x_BTD: jax.Array, dropout_keys_W=None) -> jax.Array:
        y = self.mlp_norm(x_BTD)
        y = swiglu(*together((self.gate, self.up), y, dropout_keys_W))
        return self.down(y, dropout_keys_W)
