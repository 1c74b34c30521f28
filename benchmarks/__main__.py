"""All benchmarks of this machine, into benchmarks/results/<device>.json.

    python -m benchmarks --model=runs/quickstart/model --dataset=runs/quickstart/data

What `make bench` runs, in a bit over an hour on two cores; the tables of README are made from the
file.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import loader, memory, score, start, step, workload
from sdpo_jax.errors import run_command
from sdpo_jax.runtime import set_up_jax

SIDES = ("official", "strong", "trl", "trl-best", "ours")
KS = (0, 1, 3, 5, 8, 15)


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    model, dataset = Path(args.model), Path(args.dataset)
    set_up_jax("float32")

    def steps(dataset: Path, sides: Sequence[str], ks: Sequence[int]) -> dict:
        print(f"\nsteps on {dataset}: {', '.join(sides)}")
        return step.benchmark(model, dataset, sides, ks, 4, args.repeats, "float32")

    result = {
        "loader": [loader.benchmark(model, data, 4096, 3) for data in (dataset, *args.others)],
        "step": steps(dataset, SIDES, KS),
        "step_keeping_activations": steps(dataset, ("official-keep", "ours"), (3,)),
        "step_on_others": [
            steps(data, ("official", "strong", "ours"), (3,)) for data in args.others
        ],
        "score": score.benchmark(model, dataset, 4, args.repeats, "float32"),
        "start": start.benchmark(model, dataset),
        "memory": memory.benchmark(model, dataset),
    }
    path = workload.result_file()
    workload.write_result(result, str(path))
    print(f"written to {path}; next: python -m benchmarks.tables --result={path}")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder of sdpo_jax.prepare", required=True)
    flags.DEFINE_list("others", [], "more folders of sdpo_jax.prepare, for a step at K = 3")
    flags.DEFINE_integer("repeats", 5, "timed steps of each side", lower_bound=1)
    run_command(main)
