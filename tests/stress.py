"""Kills a tiny training at random moments, again and again, and compares what it ends with.

    python tests/stress.py --kills=200

A run is killed with -9 and started again until it is finished; then its adapters must equal those
of a run that was never killed, bit for bit, and the next run begins. `make stress`.
"""

import argparse
import collections
import dataclasses
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import trainers
from tiny import hf_folder, tiny_dataset

from sdpo_jax.convert import convert
from sdpo_jax.data.prepared import write_dataset
from sdpo_jax.runs.curves import read_metrics

STEPS = 16  # two shapes per stage, which take longer to compile than all of the steps
EARLY = 0.2  # share of kills that come before the first step, while the run is being opened
LATEST = 2.0  # seconds after the first step


@dataclasses.dataclass
class Report:
    kills: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    finished: int = 0
    differences: int = 0

    def __str__(self) -> str:
        where = ", ".join(f"{n} {phase}" for phase, n in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({where}), {self.finished} runs finished, "
            f"{self.differences} arrays that differ"
        )


def phase(run: Path, lines: int) -> str:
    """Where a killed process was: the stage of its last line, if it wrote one."""
    found = read_metrics(run / "metrics")
    return f"in {found[-1]['stage']}" if len(found) > lines else "before a step"


def kill_once(flags: list[str], run: Path, draw: random.Random) -> bool:
    """Starts the run and kills it at a drawn moment; False where it ended before."""
    lines = len(read_metrics(run / "metrics"))
    process = trainers.start(flags)
    deadline = time.monotonic() + draw.uniform(0, 8)
    early = draw.random() < EARLY
    while process.poll() is None and (early or len(read_metrics(run / "metrics")) == lines):
        if early and time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if not early:
        time.sleep(draw.uniform(0, LATEST))
    if process.poll() is not None:
        trainers.end(process)
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def stress(folder: Path, kills: int, seed: int, dataset: Path, model: Path) -> Report:
    """Kills until there were `kills` of them, and lets the last run end."""
    report, draw = Report(), random.Random(seed)

    def flags(run: Path) -> list[str]:
        return trainers.config_flags(run, dataset, model, STEPS, checkpoint_every=1)

    unbroken = folder / "unbroken"
    trainers.end(trainers.start(flags(unbroken)))
    while report.kills.total() < kills:
        run, killed = folder / f"run-{report.finished}", True
        while killed and report.kills.total() < kills:
            lines = len(read_metrics(run / "metrics"))
            if killed := kill_once(flags(run), run, draw):
                report.kills[phase(run, lines)] += 1
                print(report, flush=True)
        trainers.end(trainers.start(flags(run)))
        report.finished += 1
        report.differences += trainers.differences(run, unbroken, STEPS)
        shutil.rmtree(run)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", tiny_dataset())
        convert(hf_folder(folder / "hf"), folder / "model")
        print(stress(folder, args.kills, args.seed, folder / "data", folder / "model"))


if __name__ == "__main__":
    main()
