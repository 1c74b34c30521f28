"""Frozen kernels in fewer bits: int8 with one scale per output, nf4 with one per 64 inputs.

NF4 is the code of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E). A kernel is
dequantized wherever a product reads it, so that no wide copy is ever stored.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sdpo_jax.system.errors import InputError

BASE_DTYPES = ("same", "f32", "bf16", "int8", "nf4")  # "same": that of products
QUANTIZED = ("int8", "nf4")
BLOCK = 64
# Quantiles of a normal distribution, scaled to [-1, 1], with a zero: the values of bitsandbytes.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel [J, O]. int8: codes [J, O], scale [1, O]. nf4: two codes per byte [J/2, O] and scale
    [J/64, O]; the high halves of a block of 32 bytes are its first 32 inputs, so that unpacking is
    a concatenation. Scales are float32."""

    codes: jax.Array
    scale: jax.Array
    kind: str


def quantize(kernel_JO: jax.Array, kind: str) -> Quantized:
    """The nearest codes of a kernel, scaled by the largest magnitude of an output or block.

    Leading axes are stacked layers. Raises InputError where nf4's blocks do not fit.
    """
    *stack, J, O = kernel_JO.shape  # noqa: E741 - shape letters
    kernel_JO = kernel_JO.astype(jnp.float32)
    if kind == "int8":
        scale = jnp.abs(kernel_JO).max(-2, keepdims=True) / 127
        codes = jnp.round(kernel_JO / jnp.where(scale > 0, scale, 1))
        return Quantized(codes.astype(jnp.int8), scale, kind)
    if J % BLOCK:
        raise InputError(
            f"base_dtype=nf4: found a width of {J}, expected multiples of {BLOCK}: use int8 or bf16"
        )
    blocks = kernel_JO.reshape(*stack, J // BLOCK, BLOCK, O)
    scale = jnp.abs(blocks).max(-2)
    unit = blocks / jnp.where(scale > 0, scale, 1)[..., None, :]
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = jnp.searchsorted(middles, unit).astype(jnp.uint8)
    high, low = jnp.split(codes, 2, -2)
    return Quantized((high << 4 | low).reshape(*stack, J // 2, O), scale, kind)


def dense(kernel: jax.Array | Quantized, dtype) -> jax.Array:
    """The kernel [J, O] in `dtype`."""
    if not isinstance(kernel, Quantized):
        return kernel.astype(dtype)
    codes, scale = kernel.codes, kernel.scale
    if kernel.kind == "int8":
        return (codes.astype(jnp.float32) * scale).astype(dtype)
    *stack, half, O = codes.shape  # noqa: E741 - shape letters
    halves = codes.reshape(*stack, -1, BLOCK // 2, O)
    unit = _nf4_values(jnp.concatenate([halves >> 4, halves & 15], -2))
    return (unit * scale[..., None, :]).reshape(*stack, 2 * half, O).astype(dtype)


def _nf4_values(codes: jax.Array) -> jax.Array:
    """`NF4[codes]`; on TPUs by selects, as they gather single elements far too slowly."""
    return jax.lax.platform_dependent(
        codes, tpu=_by_selects, default=lambda codes: jnp.asarray(NF4)[codes]
    )


def _by_selects(codes: jax.Array) -> jax.Array:
    values = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit & 1) == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, if_set, if_not) for if_not, if_set in pairs]
    return values[0]
