"""The tables of README, in Markdown, from a file of `benchmarks/results`.

python -m benchmarks.tables --result=benchmarks/results/DEVICE.json
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from sdpo_jax.errors import run_command
from sdpo_jax.models.weights import read_json

GIB = 2**30


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step_table(step: dict) -> str:
    """Examples a second of every side, then how many times ours is faster."""
    ks = list(step["shapes"])
    rows = []
    for side, speeds in step["examples_per_second"].items():
        cells = [f"{speeds[k]['median']:.3f}" if k in speeds else "–" for k in ks]
        rows.append([f"`{side}`, examples/s", *cells])
    for pair, ratios in step["ratio"].items():
        rows.append([pair, *(f"**{ratios[k]:.1f}x**" if k in ratios else "–" for k in ks)])
    return markdown(["", *(f"K = {k}" for k in ks)], rows)


def score_table(score: dict) -> str:
    rows = [
        [f"`{name}`", f"{speed['median']:.3f}", f"{score['ratio'][f'score/{name}']:.1f}x"]
        for name, speed in score["examples_per_second"].items()
    ]
    return markdown(["20 candidates", "examples/s", "`score` is faster by"], rows)


def memory_table(memory: dict) -> str:
    """GiB on one device by microbatch; columns are remat and K."""
    found = {
        (row["microbatch"], row["remat"], row["k"]): row["total"] for row in memory["llama2_7b"]
    }
    columns = sorted({key[1:] for key in found}, key=lambda c: (c[0] != "full", c[1]))
    rows = [
        [str(microbatch), *(f"{found[microbatch, *column] / GIB:.1f}" for column in columns)]
        for microbatch in sorted({key[0] for key in found})
    ]
    return markdown(["microbatch", *(f"`{r}`, K = {k}" for r, k in columns)], rows)


TABLES = {"step": step_table, "score": score_table, "memory": memory_table}


def main(argv: Sequence[str]) -> None:
    result = read_json(Path(flags.FLAGS.result))
    for name, table in TABLES.items():
        if name in result:
            print(table(result[name]) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("result", None, "file of benchmarks/results", required=True)
    run_command(main)
