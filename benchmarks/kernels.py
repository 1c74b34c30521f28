"""Time of causal attention, forward and backward: this package's kernel and JAX's kernels.

    python -m benchmarks.kernels --size=7b --output=FILE.json

`blocks` and `fused` are `sdpo_jax.models.attention`, without and with cuDNN; `xla` and `cudnn` are
`jax.nn.dot_product_attention` without padding.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import workload
from sdpo_jax.models.attention import attend_causal
from sdpo_jax.system.command import run_command

SIZES = {"7b": (8, 300, 32, 128), "toy": (2, 12, 4, 8)}  # B, P, N, H


def ours(q_BPNH: jax.Array, k_BPNH: jax.Array, v_BPNH: jax.Array, *, fused: bool) -> jax.Array:
    mask_BP = jnp.ones(q_BPNH.shape[:2], bool)
    out = attend_causal(q_BPNH, k_BPNH, v_BPNH, mask_BP, q_BPNH.dtype, fused=fused)
    return out.reshape(q_BPNH.shape)


KERNELS: dict[str, Callable] = {
    "blocks": functools.partial(ours, fused=False),
    "fused": functools.partial(ours, fused=True),
    "xla": functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla"),
    "cudnn": functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"
    ),
}


def time_kernel(kernel: Callable, arrays: Sequence[jax.Array], repeats: int) -> dict:
    """Median seconds of the output and all gradients, and the output's mean square to compare."""

    def loss(*arrays):
        out = kernel(*arrays).astype(jnp.float32)
        return (out * out).mean()

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, _ = jax.block_until_ready(run(*arrays))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "mean_square": float(value)}


def benchmark(size: str, repeats: int) -> dict:
    """The result as `main` writes it; kernels that this device lacks are reported and left out."""
    B, P, N, H = SIZES[size]
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(key, (B, P, N, H), jnp.bfloat16) for key in keys]
    found = {}
    for name, kernel in KERNELS.items():
        try:
            found[name] = time_kernel(kernel, arrays, repeats)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"left out: {name} ({str(error).splitlines()[0]})")
            continue
        print(f"{name:7} {1000 * found[name]['seconds']:9.3f} ms", flush=True)
    return {"shape_BPNH": [B, P, N, H], "dtype": "bfloat16", "repeats": repeats, "kernels": found}


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    result = workload.environment() | benchmark(args.size, args.repeats)
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_enum("size", "7b", list(SIZES), "shape of the arrays")
    flags.DEFINE_integer("repeats", 20, "timed runs", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
