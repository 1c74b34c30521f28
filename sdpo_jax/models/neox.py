"""The layer of GPT-NeoX (Black et al. 2022, arXiv 2204.06745), which Pythia has.

Queries, keys and values are one map; attention and MLP read the same input when `parallel`.
"""

import jax
from flax import nnx

from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import Linear, LinearOptions
from sdpo_jax.models.norms import LayerNorm
from sdpo_jax.models.rope import rotate

norm = LayerNorm  # after the last layer as well


class Layer(nnx.Module):
    """Attention and a GELU MLP, side by side or one after the other."""

    def __init__(self, config: DecoderConfig, options: LinearOptions, *, rngs: nnx.Rngs):
        c, self.config = config, config

        def linear(name: str, size_in: int, size_out: int, letters: str, bias: bool) -> Linear:
            return Linear(name, size_in, size_out, letters, options, bias=bias, rngs=rngs)

        def norm() -> LayerNorm:
            return LayerNorm(c.D, c.norm_eps, dtype=options.stored, out=options.activations)

        self.attention_norm = norm()
        self.qkv = linear("qkv", c.D, c.N * 3 * c.H, "DN", c.qkv_bias)
        self.o = linear("o", c.N * c.H, c.D, "ND", c.o_bias)
        self.mlp_norm = norm()
        self.up = linear("up", c.D, c.F, "DF", c.mlp_bias)
        self.down = linear("down", c.F, c.D, "FD", c.mlp_bias)

    def __call__(self, x_BTD, angles, attention, mlp, cache, dropout_keys_W):
        """`mlp` calls the function that it is given, whole or in pieces."""
        y = self.attention_norm(x_BTD)
        qkv = self.qkv(y, dropout_keys_W)
        # A head's query, key and value lie side by side.
        q, k, v = jax.numpy.split(qkv.reshape(*x_BTD.shape[:2], -1, 3 * self.config.H), 3, -1)
        y, kept = attention(rotate(q, angles), rotate(k, angles), v, cache)
        attended_BTD = x_BTD + self.o(y, dropout_keys_W)
        mlp_input_BTD = x_BTD if self.config.parallel else attended_BTD
        return attended_BTD + mlp(self.mlp, mlp_input_BTD, dropout_keys_W), kept

    def mlp(self, x_BTD: jax.Array, dropout_keys_W=None) -> jax.Array:
        y = self.mlp_norm(x_BTD)
        y = self.up(y, dropout_keys_W)
        y = jax.nn.gelu(y, approximate=self.config.gelu == "tanh")
        return self.down(y, dropout_keys_W)
