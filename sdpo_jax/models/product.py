"""Matrix products with operands in one dtype and sums in float32, and their transposition."""

import functools

import jax
import jax.numpy as jnp


def contract(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """`einsum` with operands in `dtype`, float32 sums and a result in x's dtype.

    For functions with a vjp of their own; what JAX differentiates is a `product`.
    """
    sums = jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=jnp.float32)
    return sums.astype(x.dtype)


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
    return dx, contract(f"{of_g},{of_x}->{of_y}", g, x, dtype).astype(y.dtype)


product.defvjp(_forward, _backward)


def transposed(x: jax.Array) -> jax.Array:
    """Swaps the last two axes of a product's small result.

    The barrier keeps XLA from folding the transposition into the product, where it would transpose
    the wide operand instead.
    """
    return jax.lax.optimization_barrier(x).mT
