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
    """Examples a second of every side, how many times ours is faster, and what a negative costs."""
    ks = list(step["shapes"])
    speeds = step["examples_per_second"]

    def row(name: str, cell, found: dict) -> list[str]:
        return [name, *(cell(found[k]) if k in found else "–" for k in ks)]

    rows = [
        row(f"`{side}`, examples/s",
            lambda s: f"{s['median']:.3f} [{s['min']:.3f}, {s['max']:.3f}]", found)
        for side, found in speeds.items()
    ]  # fmt: skip
    for pair, ratios in step["ratio"].items():
        rows.append(row(pair, lambda ratio: f"**{ratio:.1f}x**", ratios))
        side = pair.removeprefix("ours/")
        flops = {k: facts[side]["flops"] / facts["ours"]["flops"]
                 for k, facts in step["facts"].items() if side in facts}  # fmt: skip
        rows.append(row(f"FLOPs, {side}/ours", lambda ratio: f"{ratio:.1f}x", flops))
    if "3" in speeds.get("ours", {}):
        base = speeds["ours"]["3"]["median"]
        costs = {k: base / found["median"] for k, found in speeds["ours"].items()}
        rows.append(row("time of `ours` over K = 3's", lambda cost: f"{cost:.2f}", costs))
    return markdown(["", *("SFT" if k == "0" else f"K = {k}" for k in ks)], rows)


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


def tables(file: Path) -> list[str]:
    """All tables that README shows of a result."""
    result = read_json(file)
    return [table(result[name]) for name, table in TABLES.items()]


def main(argv: Sequence[str]) -> None:
    print("\n\n".join(tables(Path(flags.FLAGS.result))))


if __name__ == "__main__":
    flags.DEFINE_string("result", None, "file of benchmarks/results", required=True)
    run_command(main)
