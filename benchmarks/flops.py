"""FLOPs of the matrix products of a function, without running it.

XLA's cost analysis counts the body of a loop once, and a decoder is a loop over its layers, so the
products are counted in the traced program, each as often as the loops around it run.
"""

import math
from collections.abc import Callable, Iterator

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(function: Callable, *args) -> int:
    """Two FLOPs for each multiply-add of every product in `function(*args)`."""
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
    """The programs that an equation runs."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
