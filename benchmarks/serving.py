"""A server's seconds per person, persons per second, and memory over many requests.

    python -m benchmarks.serving --model=MODEL --adapter=FOLDER --dataset=DATA --output=FILE.json

Asks `sdpo_jax.serve` for ten titles after histories of ten, first one person after another, then
several at once. Histories are windows of the split `test_all` or `test`.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks import workload
from sdpo_jax.data.prepared import read_dataset
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError

TITLES = 10  # of a history, and of an answer
SAMPLES = 10  # of the server's memory
WARM = 3  # requests that compile


def histories(dataset: Path, count: int) -> list[list[int]]:
    """Item ids of windows with full histories. Raises InputError if the data set has none."""
    splits = read_dataset(dataset).splits
    windows = splits.get("test_all") or splits["test"]
    full = [list(w.history) for w in windows if len(w.history) >= TITLES]
    if not full:
        raise InputError(f"{dataset}: found no history of {TITLES} titles, expected some")
    return [full[i % len(full)] for i in np.random.default_rng(0).permutation(count)]


@contextlib.contextmanager
def served(options: Sequence[str]) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server once it listens, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sdpo_jax.serve", f"--port={port}", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any(f":{port}/" in line for line in iter(process.stdout.readline, "")):
            raise InputError("the server has ended: its error is above")
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def ask(address: str, history: Sequence[int]) -> float:
    """Seconds until the answer, asking again where told to. Raises InputError if it is short."""
    body = json.dumps({"history": history, "k": TITLES}).encode()
    request = urllib.request.Request(
        f"{address}/recommend", body, {"Content-Type": "application/json"}
    )
    started = time.perf_counter()
    while True:
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                found = len(json.load(answer)["items"])
            break
        except urllib.error.HTTPError as error:
            if "Retry-After" not in error.headers:
                raise InputError(f"{address}: found {error}, expected an answer") from error
            time.sleep(int(error.headers["Retry-After"]))
        except OSError as error:
            raise InputError(f"{address}: the server does not answer ({error})") from error
    if found != TITLES:
        raise InputError(f"{address}: found {found} titles, expected {TITLES}")
    return time.perf_counter() - started


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that the process occupies."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def benchmark(
    options: Sequence[str], people: Sequence[Sequence[int]], together: int
) -> dict[str, Any]:
    """Asks for each of `people` alone, then for some of them `together` at once."""
    with served(options) as (address, process):
        for history in people[:WARM]:
            ask(address, history)
        seconds, memory = list[float](), list[int]()
        for part in np.array_split(np.arange(len(people)), min(SAMPLES, len(people))):
            seconds += [ask(address, people[i]) for i in part]
            memory.append(resident(process))
        crowd = people[: 4 * together]
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(lambda history: ask(address, history), crowd[:together]))  # compiles
            started = time.perf_counter()
            list(pool.map(lambda history: ask(address, history), crowd))
            rate = len(crowd) / (time.perf_counter() - started)
    alone = 1 / statistics.fmean(seconds)
    return {
        "requests": len(seconds),
        "seconds": {f"p{q}": round(float(np.percentile(seconds, q)), 3) for q in (50, 90, 99)},
        "persons_per_second": {"alone": round(alone, 3), f"{together} at once": round(rate, 3)},
        "ratio": round(rate / alone, 2),
        "memory_mib": [round(size / 2**20) for size in memory],
    }


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    options = [f"--model={args.model}", f"--catalogue={args.dataset}"]
    if args.adapter:
        options.append(f"--adapter={args.adapter}")
    people = histories(Path(args.dataset), args.requests)
    found = workload.environment() | benchmark(options, people, args.together)
    workload.write_result(found, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", "runs/quickstart/model", "folder written by sdpo_jax.convert")
    flags.DEFINE_string("adapter", "", "folder of PEFT's adapter")
    flags.DEFINE_string("dataset", "runs/quickstart/data", "folder written by sdpo_jax.prepare")
    flags.DEFINE_integer("requests", 100, "one after the other", lower_bound=1)
    flags.DEFINE_integer("together", 16, "persons at once", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
