"""Seconds to trace and compile a step, in a first run and in a later one.

    python -m benchmarks.start --model=runs/quickstart/model --dataset=runs/quickstart/data

Compiled programs are stored in the user's cache folder, so a later run of the same shapes does not
compile. Each start is a separate process, the cold one with an empty cache.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import workload
from benchmarks.memory import one_device
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.system.command import run_command
from sdpo_jax.system.processes import set_up_jax
from sdpo_jax.training.step_memory import step_memory

NEGATIVES, BATCH = 3, 4


def seconds_to_compile(model: Path, dataset: Path) -> float:
    """Seconds to trace and compile the step of a real batch in this process."""
    set_up_jax("float32")
    examples = workload.read_workload(model, dataset).examples(BATCH, NEGATIVES)
    config = DecoderConfig.read(model)
    started = time.perf_counter()
    step_memory(
        config,
        LoraConfig(),
        examples,
        dtype="float32",
        remat="cheap",
        layout="shared_prefix",
        mesh=one_device(),
    )
    return time.perf_counter() - started


def benchmark(model: Path, dataset: Path) -> dict:
    """`{"cold": seconds, "warm": seconds}`: two processes in turn, with one cache."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.start",
        f"--model={model}",
        f"--dataset={dataset}",
        "--here",
    ]
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for start in ("cold", "warm"):
            done = subprocess.run(
                command,
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
                check=True,
                text=True,
                stdout=subprocess.PIPE,
            )
            found[start] = float(done.stdout.split()[-1])
            print(f"{start} start: {found[start]:.1f} s", flush=True)
    return found


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    model, dataset = Path(args.model), Path(args.dataset)
    if args.here:
        print(seconds_to_compile(model, dataset))
        return
    result = workload.environment() | {"seconds": benchmark(model, dataset)}
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_bool("here", False, "compile once in this process, with the existing cache")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
