"""All measurements on an accelerator, in one command of under ten minutes.

    python -m benchmarks.accelerator --model=runs/quickstart/model \
        --datasets=runs/movielens/data,runs/lastfm/data

Three parts: one epoch of both stages with the small model on each data set, with its evaluation;
the step of a Llama2-7B shape with random weights; attention kernels. --size=toy runs all in a
minute on any CPU.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import kernels, large, workload
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import set_up_jax

VARIANT = {"7b": "medium", "toy": "smoke"}  # of configs/movielens.py
WINDOWS = 400  # evaluated, of the test split
STEPS = {  # remats, numbers of negatives, batch, microbatches
    "7b": (("least", "full", "cheap"), (3, 15), 128, (4, 8)),
    "toy": (("full",), (3,), 4, (2,)),
}


def train(model: Path, dataset: Path, size: str) -> dict:
    """Trains and evaluates in separate processes, which free the device's memory at their end."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        seconds = {
            "train": _run(
                "train",
                f"--config=configs/movielens.py:{VARIANT[size]}",
                f"--workdir={run}",
                f"--config.dataset={dataset}",
                f"--config.model={model}",
            ),
            "evaluate": _run(
                "evaluate",
                f"--workdir={run}",
                "--stage=base,sft,sdpo",
                "--decoder=greedy,score",
                f"--limit={WINDOWS}",
            ),
        }
        read = {
            name: {path.stem: json.loads(path.read_text()) for path in run.glob(f"{name}/*.json")}
            for name in ("stages", "eval")
        }
    return {"dataset": str(dataset), "seconds": seconds, **read}


def _run(command: str, *arguments: str) -> float:
    """Seconds of a command of the package. Raises InputError if it fails."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"sdpo_jax.{command}", *arguments], check=False)
    if done.returncode:
        raise InputError(
            f"sdpo_jax.{command} {' '.join(arguments)}: found exit status {done.returncode}, "
            "expected 0: see its output above"
        )
    return time.perf_counter() - started


def benchmark(model: Path, datasets: Sequence[Path], size: str, repeats: int) -> dict:
    """All three parts; training is first, before this process uses the device."""
    trained = [train(model, dataset, size) for dataset in datasets]
    set_up_jax("bfloat16")
    return {
        "training": trained,
        "large": large.benchmark(size, *STEPS[size], repeats),
        "attention": kernels.benchmark(size, repeats),
    }


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    datasets = [Path(dataset) for dataset in args.datasets]
    for folder, file in (
        (Path(args.model), "model.json"),
        *((d, "dataset.json") for d in datasets),
    ):
        if not (folder / file).is_file():
            raise InputError(
                f"{folder}: found no {file}, expected a folder written by sdpo_jax.convert or "
                "sdpo_jax.prepare: correct --model or --datasets"
            )
    result = benchmark(Path(args.model), datasets, args.size, args.repeats)
    file = workload.result_file()  # the result of `python -m benchmarks`: not overwritten
    file = args.output or str(file.with_stem(f"{file.stem}-accelerator"))
    workload.write_result(result, file)
    print(f"written to {file}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_list("datasets", None, "folders written by sdpo_jax.prepare", required=True)
    flags.DEFINE_enum("size", "7b", list(VARIANT), "shape of the large step and length of the runs")
    flags.DEFINE_integer("repeats", 5, "timed steps", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file; default: one in benchmarks/results")
    run_command(main)
