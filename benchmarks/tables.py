"""The tables of docs/speed.md and docs/training.md, from a file of `benchmarks/results`.

python -m benchmarks.tables --result=benchmarks/results/DEVICE.json
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags

from benchmarks import workload
from sdpo_jax.system.command import run_command

GIB = 2**30
STEP = "step K="  # prefix of the parts of a result that are steps
SIDES = ("official", "strong", "trl", "trl-best", "ours")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step_table(result: dict) -> str:
    """Targets per second of every side, speed-ups of ours, and its relative time per K."""
    steps = {
        k: result[f"{STEP}{k}"] for k in ("0", "1", "3", "5", "8", "15") if f"{STEP}{k}" in result
    }
    speeds = {k: step["targets_per_second"] for k, step in steps.items()}
    sides = [side for side in SIDES if any(side in found for found in speeds.values())]

    def row(name: str, cell) -> list[str]:
        return [name, *(cell(k) for k in steps)]

    def speed(side: str, k: str) -> str:
        if side not in speeds[k]:
            return "–"
        found = speeds[k][side][k]
        return f"{found['median']:.3f} [{found['min']:.3f}, {found['max']:.3f}]"

    def ratio(side: str, k: str) -> str:
        if side not in speeds[k]:
            return "–"
        facts = steps[k]["facts"][k]
        flops = facts[side]["flops"] / facts["ours"]["flops"]
        return f"**{steps[k]['ratio'][f'ours/{side}'][k]:.1f}x** ({flops:.1f}x)"

    def cost(k: str) -> str:
        return f"{speeds['3']['ours']['3']['median'] / speeds[k]['ours'][k]['median']:.2f}"

    rows = [row(f"`{side}`, targets/s", functools.partial(speed, side)) for side in sides]
    rows += [
        row(f"ours / `{side}` (by FLOPs)", functools.partial(ratio, side))
        for side in sides
        if side != "ours"
    ]
    rows.append(row("time of `ours`, relative to K = 3", cost))
    return markdown(["", *("SFT" if k == "0" else f"K = {k}" for k in steps)], rows)


def score_table(result: dict) -> str:
    score = result["score"]
    rows = [
        [f"`{name}`", f"{speed['median']:.3f}", f"{score['ratio'][f'score/{name}']:.1f}x"]
        for name, speed in score["examples_per_second"].items()
    ]
    return markdown(["20 candidates", "examples/s", "speed-up of `score`"], rows)


def memory_table(result: dict) -> str:
    """GiB on one device; columns are microbatches."""
    found = {
        (row["base_dtype"], row["remat"], row["k"], row["microbatch"]): row["total"]
        for row in result["memory"]["llama2_7b"]
    }
    microbatches = sorted({key[-1] for key in found})
    rows = [
        [
            f"`{base}`",
            f"`{remat}`",
            str(k),
            *(f"{found[base, remat, k, m] / GIB:.1f}" for m in microbatches),
        ]
        for base, remat, k in dict.fromkeys(key[:-1] for key in found)
    ]
    return markdown(["base", "remat", "K", *(f"microbatch {m}" for m in microbatches)], rows)


def tables(file: Path) -> list[str]:
    """The tables of docs/ whose parts are in the result `file`."""
    result = workload.read_result(file)
    wanted = {f"{STEP}3": step_table, "score": score_table, "memory": memory_table}
    return [table(result) for part, table in wanted.items() if part in result]


def main(argv: Sequence[str]) -> None:
    print("\n\n".join(tables(Path(flags.FLAGS.result))))


if __name__ == "__main__":
    flags.DEFINE_string("result", None, "file of benchmarks/results", required=True)
    run_command(main)
