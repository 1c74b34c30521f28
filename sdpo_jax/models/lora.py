"""LoRA (Hu et al. 2021, arXiv 2106.09685) on frozen linear maps, scaled by alpha/R as PEFT does.

Shape letters are declared in `sdpo_jax.sharding`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.models.product import product, turned

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Frozen(nnx.Variable):
    """A base weight: never differentiated, shared by policy and reference."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank R, scale alpha/R, dropout on the adapter's input, and the adapted projections."""

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@jax.custom_vjp
def adapted_product(x_TI, dropped_TI, kernel_IO, a_IR, b_RO):
    """`x W + dropout(x) A B` in the kernel's dtype; `b_RO` already carries the scale.

    The vjp is written by hand for two reasons: the frozen kernel gets no cotangent, so no weight
    gradient can ever be formed; and both adapter gradients keep the small [T, R] matrix on the
    left of the product, where XLA:CPU would otherwise transpose the wide [T, I] activations.
    """
    return _adapted_forward(x_TI, dropped_TI, kernel_IO, a_IR, b_RO)[0]


def _adapted_forward(x_TI, dropped_TI, kernel_IO, a_IR, b_RO):
    dtype = kernel_IO.dtype
    xa_TR = checkpoint_name(product("ti,ir->tr", dropped_TI, a_IR, dtype), "adapter")
    y_TO = product("ti,io->to", x_TI, kernel_IO, dtype) + product("tr,ro->to", xa_TR, b_RO, dtype)
    return y_TO, (dropped_TI, xa_TR, kernel_IO, a_IR, b_RO)


def _adapted_backward(residuals, g_TO):
    dropped_TI, xa_TR, kernel_IO, a_IR, b_RO = residuals
    dtype = kernel_IO.dtype
    gb_TR = product("to,ro->tr", g_TO, b_RO, dtype)
    dx_TI = product("to,io->ti", g_TO, kernel_IO, dtype)
    d_dropped_TI = product("tr,ir->ti", gb_TR, a_IR, dtype)
    da_IR = turned(product("tr,ti->ri", gb_TR, dropped_TI, dtype)).astype(a_IR.dtype)
    db_RO = product("tr,to->ro", xa_TR, g_TO, dtype).astype(b_RO.dtype)
    return dx_TI, d_dropped_TI, None, da_IR, db_RO


adapted_product.defvjp(_adapted_forward, _adapted_backward)


class Linear(nnx.Module):
    """A frozen linear map without bias, [..., I] -> [..., O], with an adapter where targeted."""

    def __init__(self, name: str, size_in: int, size_out: int, letters: str, lora: LoraConfig,
                 *, dtype, rngs: nnx.Rngs):  # fmt: skip
        self.index = PROJECTIONS.index(name)
        self.scale, self.dropout = lora.scale, lora.dropout
        self.adapted = name in lora.targets
        std = size_in**-0.5
        self.kernel = Frozen(
            std * jax.random.normal(rngs.params(), (size_in, size_out), dtype), letters=letters
        )
        if self.adapted:
            bound = 1 / math.sqrt(size_in)  # PEFT: kaiming_uniform(a=sqrt(5)) for A, zeros for B
            self.a = nnx.LoRAParam(
                jax.random.uniform(
                    rngs.params(), (size_in, lora.rank), minval=-bound, maxval=bound
                ),
                letters=letters[0] + "R",
            )
            self.b = nnx.LoRAParam(jnp.zeros((lora.rank, size_out)), letters="R" + letters[1])

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        kernel = self.kernel[...]
        if not self.adapted:
            return product("...i,io->...o", x, kernel, kernel.dtype)
        dropped = x
        if dropout_key is not None and self.dropout > 0:
            key = jax.random.fold_in(dropout_key, self.index)
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            dropped = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        y = adapted_product(
            x.reshape(-1, x.shape[-1]),
            dropped.reshape(-1, x.shape[-1]),
            kernel,
            self.a[...],
            self.scale * self.b[...],
        )
        return checkpoint_name(y.reshape(*x.shape[:-1], -1), "product")
