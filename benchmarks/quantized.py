"""Errors of fewer bits against float32: logits, and log-probs of the 20 candidates.

    python -m benchmarks.quantized --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --windows=64 --output=FILE.json

Every base is loaded as in training, without an adapter. Products of the bases are in float32, so
their errors are those of the weights alone. `products`: base and products in bfloat16, as on CPUs;
`activations`: the activations as well, as on accelerators.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import workload
from benchmarks.score import CANDIDATES
from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Example
from sdpo_jax.evaluation import decode
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.quantize import BASE_DTYPES
from sdpo_jax.models.store import load_model
from sdpo_jax.system.command import run_command
from sdpo_jax.system.processes import set_up_jax

BATCH = 4
# Name -> how the model is loaded.
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {"dtype": "float32", "base_dtype": kind} for kind in BASE_DTYPES[1:]},
    "products": {"dtype": "bfloat16", "platform": "cpu"},
    "activations": {"dtype": "bfloat16", "platform": "tpu"},
}


def outputs(
    model: Path, batches: Sequence[dict], dtype: str = "float32", **settings: Any
) -> tuple[np.ndarray, ...]:
    """Logits [n, V] after each prompt, log-probs [n, 20] of its titles, bytes of the base."""
    found = load_model(model, LoraConfig(targets=()), dtype=dtype, **settings)

    @jax.jit
    def both(base, batch):
        decoder = nnx.merge(found.graphdef, found.lora, base)
        prefix = decode.prefill(decoder, batch)
        logits_B1V = decoder.logits(prefix.last_BD[:, None])
        return logits_B1V[:, 0], decode.score(decoder, prefix, batch)[:, 0]

    logits, logp = zip(*(both(found.base, batch) for batch in batches), strict=True)
    size = sum(x.nbytes for x in jax.tree.leaves(found.base))
    return np.concatenate(logits), np.concatenate(logp), np.int64(size)


def batches_of(examples: Sequence[Example]) -> list[dict]:
    parts = [examples[i : i + BATCH] for i in range(0, len(examples), BATCH)]
    shapes = loader.choose_shapes(parts)
    return [loader.collate(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def benchmark(
    model: Path, dataset: Path, windows: int, kinds: Sequence[str] = tuple(KINDS)
) -> dict:
    """Per kind: bytes, root mean square errors, share of windows with the same best title."""
    examples = workload.read_workload(model, dataset).examples(windows, CANDIDATES - 1)
    batches = batches_of(examples)
    logits, logp, _ = outputs(model, batches)
    rows = {}
    for name in kinds:
        other_logits, other_logp, size = outputs(model, batches, **KINDS[name])
        rows[name] = {
            "base_bytes": int(size),
            "logits_rms": float(np.sqrt(np.square(other_logits - logits).mean())),
            "logits_std": float(logits.std()),
            "logp_rms": float(np.sqrt(np.square(other_logp - logp).mean())),
            "same_best": float((other_logp.argmax(1) == logp.argmax(1)).mean()),
        }
        print(
            f"{name:11} base {size / 2**20:6.0f} MiB  logits {rows[name]['logits_rms']:.4f} of "
            f"{logits.std():.2f}  log-prob of a title {rows[name]['logp_rms']:.3f} nats  "
            f"same best candidate {rows[name]['same_best']:.2f}",
            flush=True,
        )
    return {**workload.environment(), "windows": windows, "rows": rows}


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    set_up_jax("float32")
    result = benchmark(Path(args.model), Path(args.dataset), args.windows)
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_integer("windows", 64, "evenly spread training windows", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
