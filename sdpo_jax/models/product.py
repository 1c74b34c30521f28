"""Matrix products with operands in one dtype and sums in float32, and their transposition."""

import functools

import jax
import jax.numpy as jnp


def contract(spec: str, x: jax.Array, y: jax.Array, dtype, out=None) -> jax.Array:
    """`einsum` with operands in `dtype` and a result in `out`, by default x's dtype.

    Sums are float32: matrix units of accelerators add in float32 and round the result, and on CPUs
    the result is float32. For functions with a vjp of their own; what JAX differentiates is a
    `product`.
    """
    out = out or x.dtype
    found = jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=out)
    return found.astype(out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """`contract`, with the two products of its backward pass computed in the same way.

    XLA:CPU's fast bfloat16 kernels are only reached by asking for float32 sums.
    """
    return contract(spec, x, y, dtype)


def _forward(spec, x, y, dtype):
    return contract(spec, x, y, dtype), (x, y)


def _backward(spec, dtype, residuals, g):
    x, y = residuals
    (of_x, of_y), of_g = spec.split("->")[0].split(","), spec.split("->")[1]
    dx = contract(f"{of_g},{of_y}->{of_x}", g, y, dtype)
    return dx, contract(f"{of_g},{of_x}->{of_y}", g, x, dtype, y.dtype)


product.defvjp(_forward, _backward)


def transposed(x: jax.Array) -> jax.Array:
    """Swaps the last two axes of a product's small result.

    The barrier keeps XLA from folding the transposition into the product, where it would transpose
    the wide operand instead.
    """
    return jax.lax.optimization_barrier(x).mT
