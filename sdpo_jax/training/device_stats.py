"""Use of a device: model FLOPs against its peak, memory, traces."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

Device = Any  # jax.Device, which its stubs declare as a variable
# Dense bfloat16 FLOP/s of a device, by the beginning of JAX's `device_kind`: vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
}
UNTRACED = 2  # steps before a trace: the first compiles


def model_flops(parameters: int, tokens: int, full: bool = False) -> int:
    """FLOPs that a step needs, without those that remat repeats.

    Per parameter and real token: 2 forward, 2 backward, and 2 for the gradients of weights if all
    are trained (`full`).
    """
    return (6 if full else 4) * parameters * tokens


def peak_flops(device: Device, dtype: str) -> float | None:
    """Peak FLOP/s of `device` in bfloat16; None where unknown, and for float32."""
    if dtype != "bfloat16":
        return None
    kinds = (peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind))
    return next(kinds, None)


def peak_bytes(device: Device) -> int:
    """Peak memory of `device` in use; on a CPU, of this process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def traced(batches: Iterator, folder: Path, steps: int) -> Iterator:
    """Yields `batches`, of which `jax.profiler` traces `steps` into `folder`."""
    tracing = False
    try:
        for number, batch in enumerate(batches):
            if steps and number == UNTRACED:
                jax.profiler.start_trace(str(folder))
                tracing = True
            yield batch
            if tracing and number == UNTRACED + steps - 1:
                jax.profiler.stop_trace()
                tracing = False
    finally:
        if tracing:
            jax.profiler.stop_trace()
