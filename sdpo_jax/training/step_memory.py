"""The memory of a step per device, from compiling it on abstract arrays.

No weights and no data are made, so a 7B model can be examined on a laptop.
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Example
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.system import sharding
from sdpo_jax.system.errors import InputError
from sdpo_jax.training.device_stats import Device
from sdpo_jax.training.optimizer import paper_optimizer
from sdpo_jax.training.step import build_step, make_logp, make_objective


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes on one device, and the seconds that the compilation took."""

    base: int
    state: int
    batch: int
    temporary: int
    compile_seconds: float

    @property
    def total(self) -> int:
        return self.base + self.state + self.batch + self.temporary


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """A step before its compilation; bytes are those on one device."""

    step: jax.stages.Lowered
    base: int
    state: int
    batch: int


def step_memory(*args, **settings) -> StepMemory:
    """Compiles the step of one microbatch and reads its memory; arguments as `lower_step`."""
    lowered = lower_step(*args, **settings)
    started = time.perf_counter()
    return memory_of(lowered, lowered.step.compile(), time.perf_counter() - started)


def memory_of(lowered: LoweredStep, compiled: jax.stages.Compiled, seconds: float) -> StepMemory:
    analysis: Any = compiled.memory_analysis()
    temporary = analysis.temp_size_in_bytes
    return StepMemory(lowered.base, lowered.state, lowered.batch, temporary, seconds)


def lower_step(
    config: DecoderConfig,
    lora: LoraConfig,
    examples: Sequence[Example],
    *,
    dtype,
    remat: str,
    layout: str,
    mesh: Mesh,
    base_dtype: str = "same",
) -> LoweredStep:
    """The step of one microbatch, traced on abstract arrays.

    Args:
      config: of the decoder.
      lora: of the adapter.
      examples: the microbatch of all devices; with one answer each it is a step of SFT.
      dtype: of the base and of products. XLA's CPU compiler would make a float32 copy of a
        bfloat16 base. So on CPUs the step is compiled in float32, and only the base is counted in
        `dtype`.
      base_dtype: of `quantize.BASE_DTYPES`.
      remat: key of `decoder.REMAT`.
      layout: key of `logprobs.LAYOUTS`.
      mesh: of real devices or of an ahead-of-time topology.
    """
    graphdef, adapter, base = abstract_model(config, lora, dtype, remat, mesh, base_dtype)
    base_bytes = _bytes_per_device(base)
    if sharding.platform(mesh) == "cpu":
        wide = "same" if base_dtype == "bf16" else base_dtype
        graphdef, adapter, base = abstract_model(config, lora, jnp.float32, remat, mesh, wide)
    objective = make_objective("sft" if examples[0].C == 1 else "sdpo")
    logp = make_logp(graphdef, layout)
    key = jax.random.key(0) if lora.dropout else None
    step, state = build_step(logp, objective, paper_optimizer(), adapter, mesh, dropout_key=key)
    batch = abstract_batch(examples, mesh)
    lowered = step.lower(state, base, batch)
    return LoweredStep(lowered, base_bytes, _bytes_per_device(state), _bytes_per_device(batch))


def abstract_batch(examples: Sequence[Example], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one microbatch as the step takes it, [1, B, ...]."""
    rows = sharding.data_shards(mesh)
    batch = loader.collate(examples, loader.choose_shapes([examples], rows)[0], rows)
    batch["reference_logp_BMC"] = np.zeros(batch["answers_BMCA"].shape[:3], np.float32)
    placed = sharding.batch_sharding(mesh, leading=1)
    return {
        name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype, sharding=placed)
        for name, x in batch.items()
    }


def abstract_model(
    config: DecoderConfig, lora: LoraConfig, dtype, remat: str, mesh: Mesh, base_dtype: str = "same"
):
    """Graph definition, adapter and base as shapes with their shardings."""
    place = sharding.placement(mesh)

    def make(key: jax.Array) -> Decoder:
        return Decoder(
            config,
            lora,
            dtype=dtype,
            base_dtype=base_dtype,
            remat=remat,
            platform=sharding.platform(mesh),
            rngs=nnx.Rngs(key),
        )

    graphdef, adapter, base = nnx.split(nnx.eval_shape(make, jax.random.key(0)), lora.trained, ...)
    return graphdef, _abstract(adapter, place), _abstract(base, place)


def _abstract(state: nnx.State, place) -> nnx.State:
    """Shapes of a state with their shardings."""

    def one(variable):
        shape = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=place(variable))
        return variable.replace(shape)

    return jax.tree.map(one, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _bytes_per_device(tree) -> int:
    shapes = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
    return sum(int(np.prod(shape)) * jnp.dtype(dtype).itemsize for shape, dtype in shapes)


# Fastest first; what each recomputes is said in `sdpo_jax.models.decoder`.
REMATS = ("cheap", "full", "least")
MICROBATCHES = (1, 2, 4, 8, 16, 32)
ENOUGH = 8  # a microbatch from which on a cheaper remat gains more than a larger microbatch


def fastest_fitting(
    config: DecoderConfig,
    lora: LoraConfig,
    examples: Sequence[Example],
    *,
    batch_size: int,
    limit: int,
    mesh: Mesh,
    **settings,
) -> tuple[str, int]:
    """Remat and microbatch that are probably fastest of those within `limit` bytes per device.

    Prints a line per step that it compiles. `examples`: the longest first; `settings`: of
    `lower_step`. Raises InputError where no step fits.
    """
    shards = sharding.data_shards(mesh)
    possible = [
        m for m in MICROBATCHES if batch_size % (m * shards) == 0 and m * shards <= len(examples)
    ]
    fitting = dict.fromkeys(REMATS, 0)
    for remat in REMATS:
        for microbatch in possible:
            part = examples[: microbatch * shards]
            found = step_memory(config, lora, part, remat=remat, mesh=mesh, **settings)
            fits = found.total < limit
            print(
                f"--config.remat={remat:5} --config.microbatch={microbatch:<3} "
                f"base {found.base / 2**30:6.2f}  temporary {found.temporary / 2**30:6.2f}  "
                f"in all {found.total / 2**30:6.2f}  {'fits' if fits else 'does not fit'}",
                flush=True,
            )
            if not fits:
                break
            fitting[remat] = microbatch
        if fitting[remat] >= min(ENOUGH, max(possible, default=1)):
            return remat, fitting[remat]
    largest = max(fitting.values())
    if not largest:
        raise InputError(
            f"microbatch: found none that fits in {limit / 2**30:.1f} GiB: shard the base with "
            "--config.mesh.fsdp, or store it in fewer bits with --config.base_dtype"
        )
    return next(remat for remat in REMATS if fitting[remat] == largest), largest


def limit_of(device: Device) -> int:
    """Bytes that a program may use on `device`; on a CPU the machine's free memory."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
