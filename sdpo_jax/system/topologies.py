"""Devices that are not here: XLA's TPU and GPU compilers run on any machine.

A topology is only compiled for. The compilers come with libtpu (`pip install -e '.[tpu]'`) and with
JAX's CUDA plugin (`'.[gpu]'`).
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies

from sdpo_jax.system.errors import InputError

GIB = 2**30
JAX_SHARE = 0.75  # of a GPU's memory, which JAX takes by default


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the GPU compiler asks about a device: NVIDIA's data sheets, and openxla/xla's specs."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    memory: int  # bytes
    bandwidth: float  # bytes per second
    l2_cache: int  # bytes
    shared_memory: int  # bytes per multiprocessor


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 80 * GIB, 2.039e12, 40 * 2**20, 167936),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 80 * GIB, 3.35e12, 50 * 2**20, 233472),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 141 * GIB, 4.8e12, 50 * 2**20, 233472),
}
# Bytes of memory per device that a program may use: the compiler's own limits.
TPUS = {"v4": 32 * GIB, "v5e": 15.75 * GIB, "v5p": 95 * GIB, "v6e": 31.25 * GIB}
EXPECTED = "v5e:4x4, v5p:2x2x1, v6e:1x1, h100, 8xh100, h200 or a100"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for, and the bytes that a program may use on each."""

    devices: Sequence[Any]
    limit: int


@functools.cache
def open_topology(name: str) -> Topology:
    """The devices of `name`: a TPU slice such as "v5e:4x4", or GPUs such as "8xh100".

    To be called before JAX is asked for its own devices. Raises InputError for an unknown name, or
    where the compiler is not installed.
    """
    # Without it JAX would look for the device itself.
    jax.config.update("jax_platforms", "cpu")
    if found := re.fullmatch(r"(?:(\d+)x)?(a100|h100|h200)", name):
        return _gpus(GPUS[found[2]], int(found[1] or 1))
    if found := re.fullmatch(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})", name):
        return _tpus(found[1], found[2], name)
    raise InputError(f"topology: found {name}, expected for example {EXPECTED}")


def _tpus(kind: str, shape: str, name: str) -> Topology:
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # asks the cloud's metadata server
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{kind}-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process is refused
    }
    os.environ.update(settings)
    options: dict[str, Any] = {}
    if set(shape.split("x")) == {"1"}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":
        options["chip_config_name"] = "megacore"
    devices = _describe(name, "tpu", name, options, "tpu")
    return Topology(devices, int(TPUS[kind]))


def _gpus(gpu: Gpu, count: int) -> Topology:
    options = {"topology": f"1x1x{count}", "target_config": target_config(gpu)}
    devices = _describe(gpu.name, "cuda", f"1x1x{count}", options, "gpu")
    return Topology(devices, int(JAX_SHARE * gpu.memory))


def _describe(what: str, platform: str, name: str, options: Mapping[str, Any], extra: str):
    try:
        return topologies.get_topology_desc(
            platform=platform, topology_name=name, **options
        ).devices
    except Exception as error:  # of the plugin, which has no type of its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(
            f"topology {what}: XLA's compiler for it says: {reason}; expected a shape that exists, "
            f"and the compiler: pip install -e '.[{extra}]'"
        ) from error


def target_config(gpu: Gpu) -> str:
    """XLA's GpuTargetConfigProto as text."""
    major, minor = gpu.capability
    return f"""
      gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32
        shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory}
        shared_memory_per_block_optin: {gpu.shared_memory - 1024}
        threads_per_core_limit: 2048 core_count: {gpu.multiprocessors} fpus_per_core: 128
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
        memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: {gpu.l2_cache}
        clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory}
        cuda_compute_capability {{
          major: {major} minor: {minor} {"feature_extension: ACCELERATED_FEATURES" * (major >= 9)}
        }}
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_address_bits: 64
        name: "{gpu.name}" driver_version: "13.0.0" runtime_version: "12.9.0"
        compile_time_toolkit_version: "12.9.0" dnn_version: "9.10.0"
      }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
      device_description_str: "{gpu.name}"
    """
