"""All benchmarks of this machine, into benchmarks/results/<device>.json.

    python -m benchmarks --model=runs/quickstart/model --dataset=runs/quickstart/data

What `make bench` runs, in about an hour on two cores; the tables of README are made from the file.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from benchmarks import loader, memory, score, step, workload
from sdpo_jax.errors import run_command
from sdpo_jax.runtime import set_up_jax
from sdpo_jax.workdir import write_json

SIDES = ("official", "strong", "trl", "trl-best", "ours")
KS = (1, 3, 5, 8, 15)
RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    """`amd-epyc-2-threads`, or the accelerator's name."""
    found = workload.environment()
    name = found["device"]
    if jax.default_backend() == "cpu":
        name = f"{found['processor'] or name} {found['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    model, dataset = Path(args.model), Path(args.dataset)
    set_up_jax("float32")
    result = {
        "loader": loader.benchmark(model, dataset, 4096, 3),
        "step": step.benchmark(model, dataset, SIDES, KS, 4, args.repeats, "float32"),
        "score": score.benchmark(model, dataset, 4, args.repeats, "float32"),
        "memory": memory.benchmark(model, dataset),
    }
    path = RESULTS / f"{device_name()}.json"
    write_json(path, result)
    print(f"written to {path}; next: python -m benchmarks.tables --result={path}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder of sdpo_jax.prepare", required=True)
    flags.DEFINE_integer("repeats", 5, "timed steps of each side", lower_bound=1)
    run_command(main)
