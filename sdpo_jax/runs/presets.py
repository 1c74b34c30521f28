"""What the configs of the data sets have in common; each changes only what differs.

The keys, their defaults and what they mean are in `sdpo_jax.runs.config.RunConfig`, and
`sdpo train --config=FILE --help_config` prints them.
"""

import dataclasses
import importlib.metadata
import pathlib
from typing import Any

import ml_collections

from sdpo_jax.runs.config import RunConfig

Config = Any  # an ml_collections.ConfigDict, whose keys type checkers cannot know
CPUINFO = pathlib.Path("/proc/cpuinfo")


def get_config() -> Config:
    """All keys at their defaults."""
    return ml_collections.ConfigDict(dataclasses.asdict(RunConfig()))


def smoke(config: Config) -> Config:
    """The same run in a few steps of the quickstart's small model, to see that all is in place."""
    config.model = "runs/quickstart/model"
    config.dtype, config.remat = "float32", "cheap"
    config.batch_size, config.microbatch = 4, 2
    config.sft.max_steps = config.sdpo.max_steps = 4
    config.eval_every = config.checkpoint_every = 2
    config.validation_windows = 8
    return config


def small(config: Config) -> Config:
    """Hundreds of examples in each stage with the quickstart's small model: for a CPU."""
    config.model = "runs/quickstart/model"
    # The model is an instruct model: it answers sooner, and ends sooner, in its own chat format.
    config.chat_template = True
    config.dtype, config.remat = "float32", "cheap"
    config.batch_size, config.microbatch = 8, 4
    config.lora.dropout = 0.0
    config.clip = 1.0
    config.sft.epochs = config.sdpo.epochs = 1
    config.sft.max_steps, config.sft.learning_rate = 80, 1e-3
    config.sdpo.max_steps, config.sdpo.learning_rate = 40, 6e-5
    config.validation_windows = 64
    config.eval_every, config.checkpoint_every = 40, 20
    return config


def cpu_dtypes() -> tuple[str, str]:
    """`dtype` and `base_dtype`: products in bfloat16 where this CPU multiplies it, else in float32.

    /proc/cpuinfo says so on Linux. Other CPUs emulate it, slower than float32, and jax 0.11 fails
    in such products on a CPU. The base is float32 in both cases: XLA:CPU would make a float32 copy
    of a bfloat16 one in every call.
    """
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    able = "avx512_bf16" in flags or "amx_bf16" in flags
    major, minor, *_ = importlib.metadata.version("jax").split(".")
    if able and (int(major), int(minor)) < (0, 11):
        return "bfloat16", "f32"
    return "float32", "same"


def medium(config: Config) -> Config:
    """Every training window once in each stage with the quickstart's small model: for one GPU."""
    config.model = "runs/quickstart/model"
    config.microbatch, config.remat = 32, "cheap"
    config.sft.epochs = config.sdpo.epochs = 1
    config.sft.learning_rate, config.sdpo.learning_rate = 1e-3, 1e-4
    config.eval_every = config.checkpoint_every = 200
    config.validation_windows = 256
    return config


def histories(config: Config) -> Config:
    """Every title of a history a target, with the quickstart's small model: for one GPU.

    An adapter of rank 16, three epochs of SFT, one of S-DPO.
    """
    config.dataset = "runs/quickstart/data"
    config.model = "runs/quickstart/model"
    config.prompt, config.negatives = "history", "uniform"
    config.remat = "cheap"
    config.batch_size, config.microbatch = 8, 8
    config.lora.rank, config.lora.alpha, config.lora.dropout = 16, 64.0, 0.0
    config.clip = 1.0
    config.sft.epochs, config.sft.learning_rate = 3, 2e-3
    config.sdpo.epochs, config.sdpo.learning_rate = 1, 1e-4
    config.validation_split, config.validation_windows = "val_all", 600
    config.eval_every = config.checkpoint_every = 200
    return config


def histories_on_cpu(config: Config) -> Config:
    """The same in a quarter of an hour on two cores: 23,000 targets of SFT, 6 steps of S-DPO."""
    config = histories(config)
    config.dtype, config.base_dtype = cpu_dtypes()
    # Two segments, about 90 targets per step.
    config.batch_size, config.microbatch = 2, 2
    config.sft.epochs, config.sft.max_steps, config.sft.learning_rate = 1, 260, 2.5e-3
    config.sdpo.max_steps = 6
    config.validation_windows = 50
    config.eval_every, config.checkpoint_every = 260, 65
    return config


def variant(config, arg: str, **changes):
    """Applies the change named by the config file's argument (`file.py:arg`), if there is one."""
    if arg and arg not in changes:
        raise ValueError(f"config argument {arg!r} is unknown: expected {' or '.join(changes)}")
    return changes[arg](config) if arg else config
