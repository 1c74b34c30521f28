"""Frozen linear maps, and LoRA on them (Hu et al. 2021, arXiv 2106.09685), scaled as PEFT does.

Shape letters are declared in `sdpo_jax.system.sharding`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from sdpo_jax.models.product import contract, product, transposed
from sdpo_jax.models.quantize import QUANTIZED, Quantized, dense, quantize
from sdpo_jax.system.errors import InputError

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down", "qkv")
APART = ("q", "k", "v")


class Frozen(nnx.Variable):
    """A base weight, shared by policy and reference and never differentiated; trained only with
    `tune=full`."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is trained: an adapter, or (`full`) every weight and no adapter.

    Of an adapter: rank R, scale alpha/R, dropout on its input, and the adapted projections.
    """

    rank: int = 8
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = PROJECTIONS[:7]
    full: bool = False

    @property
    def trained(self) -> type[nnx.Variable]:
        """The variables that are trained; the rest is frozen."""
        return Frozen if self.full else nnx.LoRAParam

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def on(self, projections: Sequence[str]) -> "LoraConfig":
        """The same for a model that has these projections.

        Where q, k and v are one map, the three together mean that map. `gate` is left out for a
        model without one. Raises InputError for any other target that the model lacks.
        """
        targets = list(self.targets)
        if "qkv" in projections and set(APART) <= set(targets):
            targets = ["qkv", *(name for name in targets if name not in APART)]
        if "gate" not in projections:
            targets = [name for name in targets if name != "gate"]
        unknown = [name for name in targets if name not in projections]
        if unknown or (self.targets and not targets):
            raise InputError(
                f"lora.targets: found {', '.join(unknown or self.targets)}, this model has "
                f"{', '.join(projections)}: set --config.lora.targets"
            )
        return dataclasses.replace(self, targets=tuple(targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def frozen_product(x_TJ: jax.Array, kernel: jax.Array | Quantized, dtype) -> jax.Array:
    """`x W` in `dtype`. The kernel has no cotangent, so no weight gradient can be formed."""
    return contract("tj,jo->to", x_TJ, dense(kernel, dtype), dtype)


def _frozen_backward(dtype, kernel, g_TO):
    return contract("to,jo->tj", g_TO, dense(kernel, dtype), dtype), None


frozen_product.defvjp(
    lambda x_TJ, kernel, dtype: (frozen_product(x_TJ, kernel, dtype), kernel), _frozen_backward
)


Pairs = Sequence[tuple[jax.Array, jax.Array]]  # a_JR and b_RO of each adapter


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def adapter_products(x_TJ: jax.Array, pairs: Pairs, dtype) -> tuple[jax.Array, ...]:
    """`x A B` in `dtype` for the adapters of all maps that read `x`; `b_RO` includes the scale.

    The A's are one matrix, so that `x` is read once. Both adapter gradients keep the small [T, R]
    matrix on the left of the product, where XLA:CPU would otherwise transpose the wide [T, J]
    activations.
    """
    return _adapter_forward(x_TJ, pairs, dtype)[0]


def _adapter_forward(x_TJ, pairs, dtype):
    a_JR = jnp.concatenate([a for a, _ in pairs], 1)
    xa_TR = checkpoint_name(contract("tj,jr->tr", x_TJ, a_JR, dtype), "adapter")
    parts = jnp.split(xa_TR, len(pairs), 1)
    out = [contract("tr,ro->to", xa, b, dtype) for xa, (_, b) in zip(parts, pairs, strict=True)]
    return tuple(out), (x_TJ, xa_TR, pairs)


def _adapter_backward(dtype, residuals, g):
    x_TJ, xa_TR, pairs = residuals
    gb = [contract("to,ro->tr", g_TO, b, dtype) for g_TO, (_, b) in zip(g, pairs, strict=True)]
    gb_TR, a_JR = jnp.concatenate(gb, 1), jnp.concatenate([a for a, _ in pairs], 1)
    dx_TJ = contract("tr,jr->tj", gb_TR, a_JR, dtype)
    da_JR = transposed(contract("tr,tj->rj", gb_TR, x_TJ, dtype, a_JR.dtype))
    parts = zip(jnp.split(da_JR, len(pairs), 1), jnp.split(xa_TR, len(pairs), 1), g, strict=True)
    return dx_TJ, type(pairs)(
        (da, contract("tr,to->ro", xa, g_TO, dtype, da.dtype)) for da, xa, g_TO in parts
    )


adapter_products.defvjp(_adapter_forward, _adapter_backward)


@dataclasses.dataclass(frozen=True)
class LinearOptions:
    """What all linear maps of a model share.

    `dtype` is that of products; `base_dtype`, of `quantize.BASE_DTYPES`, that in which the frozen
    base is stored; `activations` that of what passes between the products of a layer. The residual
    stream is float32.
    """

    lora: LoraConfig
    dtype: Any = jnp.float32
    base_dtype: str = "same"
    activations: Any = jnp.float32

    @property
    def stored(self):
        """The dtype of embedding, norms, biases, head and plain kernels; float32 if trained."""
        if self.lora.full:
            return jnp.float32
        return {"f32": jnp.float32, "bf16": jnp.bfloat16}.get(self.base_dtype, self.dtype)


def fold_in(dropout_keys_W: Any, number: Any) -> Any:
    """One dropout key per row, each folded with `number`; None stays None."""
    if dropout_keys_W is None:
        return None
    return jax.vmap(jax.random.fold_in, (0, None))(dropout_keys_W, number)


def dropout(x_WTJ: jax.Array, keys_W: jax.Array, rate: float) -> jax.Array:
    """Zeros at about `rate` of the places, drawn per row; the others are scaled up in turn.

    The cost of dropout is drawing random words of four bytes. Each place takes one byte, so the
    rate is a multiple of 1/256 (0.1 becomes 26/256), and the scale follows it.
    """
    *_, tokens, width = x_WTJ.shape
    lost = min(max(round(256 * rate), 1), 255)
    draw = functools.partial(jax.random.bits, shape=(tokens, -(-width // 4)), dtype=jnp.uint32)
    drawn = jax.lax.bitcast_convert_type(jax.vmap(draw)(keys_W), jnp.uint8)
    kept_WTJ = drawn.reshape(*x_WTJ.shape[:2], -1)[..., :width] >= lost
    return jnp.where(kept_WTJ, x_WTJ * (256 / (256 - lost)), 0).astype(x_WTJ.dtype)


class Linear(nnx.Module):
    """A frozen linear map, [..., J] -> [..., O], with an adapter where targeted."""

    def __init__(
        self,
        name: str,
        size_in: int,
        size_out: int,
        letters: str,
        options: LinearOptions,
        *,
        bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.index, self.options = PROJECTIONS.index(name), options
        self.adapted = name in options.lora.targets
        kernel = size_in**-0.5 * jax.random.normal(
            rngs.params(), (size_in, size_out), options.stored
        )
        if options.base_dtype in QUANTIZED:
            codes = quantize(kernel, options.base_dtype)
            rows = codes.codes.shape[0] // codes.scale.shape[0]  # that share a scale
            unit = rows if options.base_dtype == "nf4" else 1
            self.codes = Frozen(codes.codes, letters=letters, unit=unit)
            self.scale = Frozen(codes.scale, letters=letters)
        else:
            self.kernel = Frozen(kernel, letters=letters)
        if bias:
            self.bias = Frozen(jnp.zeros(size_out, options.stored), letters=letters[1])
        self.biased = bias
        if self.adapted:
            rank = options.lora.rank
            bound = 1 / math.sqrt(size_in)  # PEFT: kaiming_uniform(a=sqrt(5)) for A, zeros for B
            self.a = nnx.LoRAParam(
                jax.random.uniform(rngs.params(), (size_in, rank), minval=-bound, maxval=bound),
                letters=letters[0] + "R",
            )
            self.b = nnx.LoRAParam(jnp.zeros((rank, size_out)), letters="R" + letters[1])

    @property
    def weight(self) -> jax.Array | Quantized:
        if self.options.base_dtype in QUANTIZED:
            return Quantized(self.codes[...], self.scale[...], self.options.base_dtype)
        return self.kernel[...]

    def frozen(self, x_TJ: jax.Array) -> jax.Array:
        """The map without adapter and bias."""
        if self.options.lora.full:
            return product("tj,jo->to", x_TJ, self.kernel[...], self.options.dtype)
        return frozen_product(x_TJ, self.weight, self.options.dtype)

    def __call__(self, x: jax.Array, dropout_keys_W: jax.Array | None) -> jax.Array:
        return together((self,), x, dropout_keys_W)[0]


def together(
    maps: Sequence[Linear], x: jax.Array, dropout_keys_W: jax.Array | None
) -> tuple[jax.Array, ...]:
    """The results of maps that read the same `x`; their adapters share its dropout."""
    options, adapted = maps[0].options, [m for m in maps if m.adapted]
    x_TJ = x.reshape(-1, x.shape[-1])
    added: Any = iter(())
    if adapted:
        rate = options.lora.dropout
        if dropout_keys_W is not None and rate:
            x = dropout(x, fold_in(dropout_keys_W, maps[0].index), rate)
        pairs = tuple((m.a[...], options.lora.scale * m.b[...]) for m in adapted)
        added = iter(adapter_products(x.reshape(x_TJ.shape), pairs, options.dtype))
    found = []
    for m in maps:
        y_TO: Any = m.frozen(x_TJ)
        if m.adapted:
            y_TO += next(added)
        if m.biased:
            y_TO += m.bias[...].astype(y_TO.dtype)
        found.append(checkpoint_name(y_TO.reshape(*x.shape[:-1], -1), "product"))
    return tuple(found)
