"""Training processes on the tiny model, and what they leave."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from ml_collections import ConfigDict

from sdpo_jax import train as command
from sdpo_jax.runs.checkpoints import Checkpoints
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.runs.curves import read_metrics

ROOT = Path(__file__).parents[1]
NEVER = SimpleNamespace(ask=lambda: False, check=lambda: None)  # a StopSignal
# The tests compile much and compute little: a third of the default's time to compile.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_cpu_multi_thread_eigen=false"
)
TIMEOUT = 300  # seconds after which a process that should have ended fails its test


def train(config: ConfigDict, run: Path, stop=NEVER, experiment: str = "") -> None:
    """The command's on a config as a file builds it."""
    command.train(RunConfig.of(config.to_dict()), run, stop, experiment)


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
    """That of a process with its own number of devices, not with the tests' eight."""
    return (
        os.environ
        | {
            "XLA_FLAGS": XLA_FLAGS,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHON": sys.executable,
            "GRACE": "1",
        }
        | changes
    )


def config_flags(run: Path, dataset: Path, model: Path, steps: int, **changes) -> list[str]:
    keys = {
        "dataset": dataset,
        "model": model,
        "dtype": "float32",
        "remat": "none",
        "batch_size": 4,
        "microbatch": 2,
        "lora.dropout": 0.1,
        "sft.epochs": 8,
        "sft.max_steps": steps,
        "sft.learning_rate": 0.01,
        "sdpo.epochs": 8,
        "sdpo.max_steps": steps,
        "sdpo.learning_rate": 0.01,
        "eval_every": 6,
        "checkpoint_every": 2,
        "validation_windows": 6,
    } | changes
    return [
        "--config=configs/movielens.py",
        f"--workdir={run}",
        *(f"--config.{k}={v}" for k, v in keys.items()),
    ]


def history_flags(run: Path, dataset: Path, model: Path, steps: int, **changes) -> list[str]:
    """Of histories, with small steps.

    Adam turns a gradient of rounding's size into a step as large as any other.
    """
    keys = {
        "prompt": "history",
        "segment": 4,
        "history": 3,
        "negatives": "uniform",
        "redraw": True,
        "batch_size": 8,
        "microbatch": 1,
        "sft.learning_rate": 0.002,
        "sdpo.learning_rate": 0.002,
    }
    return config_flags(run, dataset, model, steps, **keys | changes)


def start(flags: Sequence[str], *, processes: int = 1, **settings) -> subprocess.Popen:
    """One process, or `launch/local.sh` with several; a group of its own."""
    one = [sys.executable, "-m", "sdpo_jax.train"]
    command = one if processes == 1 else ["launch/local.sh", str(processes)]
    return subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        env=environment(**settings),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(process: subprocess.Popen, expected: int = 0) -> str:
    """What a process printed until its end, which has the `expected` status."""
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == expected, output
    return output


def wait_until(process: subprocess.Popen, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            return
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(f"it never came: {process.communicate()[0]}")


def wait_for_step(process: subprocess.Popen, run: Path, stage: str, step: int) -> None:
    """Returns when metrics.jsonl shows `step` of `stage`."""
    wait_until(
        process,
        lambda: any(
            m["stage"] == stage and m["step"] >= step for m in read_metrics(run / "metrics")
        ),
    )


def curve(run: Path, stage: str) -> list[float]:
    """The loss of every step, which must be there once."""
    lines = [m for m in read_metrics(run / "metrics") if m["stage"] == stage and "loss" in m]
    assert [m["step"] for m in lines] == list(range(1, len(lines) + 1))
    return [m["loss"] for m in lines]


def adapters(run: Path, step: int) -> dict[str, list[np.ndarray]]:
    """LoRA arrays of each stage that was run at `step`, as stored."""
    found = {}
    for stage in (stage for stage in ("sft", "sdpo") if (run / stage).exists()):
        checkpoints = Checkpoints(run / stage, read_only=True)
        stored = checkpoints.restore_raw(step)
        found[stage] = [np.asarray(x) for x in jax.tree.leaves(stored)]
        checkpoints.close()
    return found


def differences(run: Path, other: Path, step: int) -> int:
    """How many arrays of the two runs' adapters at `step` are not equal bit for bit."""
    found, expected = adapters(run, step), adapters(other, step)
    return sum(
        a.tobytes() != b.tobytes()
        for stage in expected
        for a, b in zip(found[stage], expected[stage], strict=True)
    )
