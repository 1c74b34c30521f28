"""Norms, computed in float32 from the residual stream, which is float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.models.lora import Frozen


class RMSNorm(nnx.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467); its result is in `out`."""

    def __init__(self, size: int, eps: float, *, dtype, out=jnp.float32):
        self.eps, self.out = eps, out
        self.scale = Frozen(jnp.ones(size, dtype), letters="-")

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)
        x32 *= checkpoint_name(inverse, "norm")
        return (x32 * self.scale[...]).astype(self.out)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias (Ba et al. 2016, arXiv 1607.06450); its result is in `out`."""

    def __init__(self, size: int, eps: float, *, dtype, out=jnp.float32):
        self.eps, self.out = eps, out
        self.scale = Frozen(jnp.ones(size, dtype), letters="-")
        self.bias = Frozen(jnp.zeros(size, dtype), letters="-")

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = checkpoint_name(jnp.mean(x32, -1, keepdims=True), "norm")
        variance = jnp.mean(jnp.square(x32 - mean), -1, keepdims=True)
        inverse = checkpoint_name(jax.lax.rsqrt(variance + self.eps), "norm")
        x32 = (x32 - mean) * inverse
        return (x32 * self.scale[...] + self.bias[...]).astype(self.out)
