"""FLOPs of the matrix products of a function, without running it.

XLA's cost analysis counts the body of a loop once, and a decoder is a loop over its layers.
Therefore the products are counted in the traced program, once per iteration of the loops around
them.
"""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(function: Callable, *args) -> int:
    """FLOPs of the matrix products in `function(*args)`, two per multiply-add."""
    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += turns * sum(_flops(inner) for inner in _inside(equation.params))
    return total


def _inside(params: dict) -> Iterator[Jaxpr]:
    """The inner programs of an equation, such as the body of a loop."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
