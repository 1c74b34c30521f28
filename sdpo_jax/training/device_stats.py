"""What a step takes of a device: tokens, model FLOPs against the device's peak, memory."""

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
    """FLOPs that a step needs; what remat computes again is not counted.

    Per parameter and real token: 2 forward, 2 backward, and where all weights are trained (`full`)
    2 for their gradients.
    """
    return (6 if full else 4) * parameters * tokens


def peak_flops(device: Device, dtype: str) -> float | None:
    """FLOP/s that `device` could do in bfloat16; None where unknown, and in float32."""
    if dtype != "bfloat16":
        return None
    kinds = (peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind))
    return next(kinds, None)


def peak_bytes(device: Device) -> int:
    """The most that was in use on `device`; of a CPU, by this process."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def traced(batches: Iterator, folder: Path, steps: int) -> Iterator:
    """Passes `batches` on while `jax.profiler` writes what `steps` of them do into `folder`."""
    going = False
    try:
        for number, batch in enumerate(batches):
            if steps and number == UNTRACED:
                jax.profiler.start_trace(str(folder))
                going = True
            yield batch
            if going and number == UNTRACED + steps - 1:
                jax.profiler.stop_trace()
                going = False
    finally:
        if going:
            jax.profiler.stop_trace()
