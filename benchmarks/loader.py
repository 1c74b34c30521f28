"""Tokens per second of the data pipeline: tokenizing, then batching with grain.

    python -m benchmarks.loader --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --windows=4096 --output=FILE.json

A stage tokenizes its windows once, before its first step; during training it only makes batches.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import workload
from sdpo_jax.data import loader
from sdpo_jax.system.command import run_command

BATCH, ROWS = 32, 8


def benchmark(model: Path, dataset: Path, windows: int, num_negatives: int) -> dict:
    """Tokens per second of both parts without padding, and their share of the padded batches."""
    work = workload.read_workload(model, dataset)
    started = time.perf_counter()
    examples = work.examples(windows, num_negatives)
    tokenized = time.perf_counter()
    lengths = {i: len(example.prompt) for i, example in enumerate(examples)}
    order = [int(i) for i in loader.stream(windows // BATCH * BATCH, 0, 1)]
    cut = []
    for part in loader.grouped_batches(order, lengths, BATCH, 0, alike=True):
        balanced = loader.balance([examples[i].tokens for i in part], ROWS)
        cut.append([examples[part[j]] for j in balanced])
    fed = sum(batch["slot_WT"].size for batch in loader.batches(cut, rows=ROWS))
    made = time.perf_counter()
    real = sum(example.tokens for part in cut for example in part)
    return {
        **workload.environment(),
        "windows": windows,
        "k": num_negatives,
        "tokenizing_tokens_per_second": sum(e.tokens for e in examples) / (tokenized - started),
        "batching_tokens_per_second": real / (made - tokenized),
        "real_tokens_of_fed": real / fed,
    }


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    result = benchmark(Path(args.model), Path(args.dataset), args.windows, args.k)
    for name in ("tokenizing_tokens_per_second", "batching_tokens_per_second"):
        print(f"{name:30} {result[name]:12,.0f}")
    print(f"{'real_tokens_of_fed':30} {result['real_tokens_of_fed']:12.3f}")
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_integer("windows", 4096, "evenly spread training windows", lower_bound=BATCH)
    flags.DEFINE_integer("k", 3, "number of negatives", lower_bound=0)
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
