"""Speed of scoring 20 candidates: one pass with a shared prompt, 20 full rows, and generation.

    python -m benchmarks.score --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --batch=4 --repeats=5 --output=FILE.json

Sides: `score` (the prompt once, all candidates packed), `copies` (one full row per candidate),
`greedy` and `trie` (generation from the prompt's cache). The sides take turns in every repeat.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import workload
from benchmarks.step import measure
from sdpo_jax.data import loader
from sdpo_jax.data.tokens import NEW_TOKENS, Example
from sdpo_jax.evaluation import decode
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import Model, load_model
from sdpo_jax.objectives.logprobs import padded_logp
from sdpo_jax.system.command import run_command
from sdpo_jax.system.processes import set_up_jax

CANDIDATES = 20


def copies(decoder, batch):
    """`logp_BMC`, one example at a time: its 20 rows are enough to fill any device."""
    each = {name: x[:, None] for name, x in batch.items() if name != "slot_WT"}
    return jax.lax.map(lambda one: padded_logp(decoder, one)[0], each)


class Side:
    """One way from a batch to answers, with the `prepare` of a side of `benchmarks.step`."""

    def __init__(self, model: Model, function: Callable, scores: bool):
        self.model, self.scores = model, scores
        self.function = jax.jit(
            lambda lora, base, batch: function(nnx.merge(model.graphdef, lora, base), batch)
        )

    def prepare(self, examples: Sequence[Example]) -> tuple[Callable[[], float], dict]:
        batch = jax.device_put(loader.collate(examples, loader.choose_shapes([examples])[0]))

        def call() -> jax.Array:
            return jax.block_until_ready(self.function(self.model.lora, self.model.base, batch))

        def run() -> float:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started

        found = np.asarray(call())
        return run, {"logp_XC": found.reshape(-1, found.shape[-1]) if self.scores else None}


def make_sides(model: Model) -> dict[str, Side]:
    eos = model.tokenizer.eos_token_id

    def score(decoder, batch):
        return decode.score(decoder, decode.prefill(decoder, batch), batch)

    def greedy(decoder, batch):
        return decode.greedy(decoder, decode.prefill(decoder, batch), [eos], NEW_TOKENS)

    def trie(decoder, batch):
        return decode.trie(decoder, decode.prefill(decoder, batch), batch["answers_BMCA"][:, 0])

    return {
        "copies": Side(model, copies, scores=True),
        "score": Side(model, score, scores=True),
        "greedy": Side(model, greedy, scores=False),
        "trie": Side(model, trie, scores=False),
    }


def benchmark(model: Path, dataset: Path, batch: int, repeats: int, dtype: str) -> dict:
    """The result as `main` writes it."""
    examples = workload.read_workload(model, dataset).examples(batch, CANDIDATES - 1)
    sides = make_sides(load_model(model, LoraConfig(), dtype=dtype))
    seconds, _ = measure(sides, examples, repeats)
    result = {
        "batch": batch,
        "dtype": dtype,
        "repeats": repeats,
        **workload.environment(),
        "shapes": workload.lengths(examples),
        "examples_per_second": {},
        "ratio": {},
    }
    for name, values in seconds.items():
        speed = workload.spread_of([batch / value for value in values])
        pairs = zip(values, seconds["score"], strict=True)
        ratio = statistics.median(theirs / mine for theirs, mine in pairs)
        result["examples_per_second"][name], result["ratio"][f"score/{name}"] = speed, ratio
        print(
            f"{name:8} {speed['median']:8.3f} examples/s [{speed['min']:.3f}, "
            f"{speed['max']:.3f}]   score / {name}: {ratio:.2f}",
            flush=True,
        )
    return result


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    set_up_jax(args.dtype)
    result = benchmark(Path(args.model), Path(args.dataset), args.batch, args.repeats, args.dtype)
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_integer("batch", 4, "windows at once", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "timed runs per side", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of base and products")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
