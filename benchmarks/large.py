"""A Llama2-7B-shaped step with random weights on one accelerator: time, MFU, peak memory.

    python -m benchmarks.large --k=3,15 --batch=128 --microbatch=4,8,16 --remat=full,cheap \
        --output=FILE.json

MFU counts 4 FLOPs per parameter and token without padding, as a frozen base has no weight gradient;
recomputation does not count. --size=toy runs on any CPU in seconds. --official times the official
recipe's step in PyTorch at this shape instead, with the frozen base in bfloat16, gradient
checkpointing and 16 full rows at once; set XLA_PYTHON_CLIENT_PREALLOCATE=false for it.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from benchmarks import workload
from benchmarks.memory import LLAMA2_7B, one_device
from sdpo_jax.data import loader
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import REMAT
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import set_up_jax
from sdpo_jax.training import device_stats
from sdpo_jax.training.optimizer import paper_optimizer
from sdpo_jax.training.step import build_step, make_logp, make_objective
from sdpo_jax.training.step_memory import abstract_model

SIZES = {
    "7b": (LLAMA2_7B, workload.PROMPT),
    "toy": (DecoderConfig(V=97, L=3, D=16, N=4, G=4, H=4, F=24), 12),
}


def random_state(abstract, seed: int):
    """Normal numbers of standard deviation 0.02 in the shape, dtype and sharding of every leaf."""
    leaves, structure = jax.tree.flatten(abstract)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = []
    for x, key in zip(leaves, keys, strict=True):
        draw = functools.partial(jax.random.normal, shape=x.shape, dtype=x.dtype)
        made.append(jax.jit(lambda k, draw=draw: 0.02 * draw(k), out_shardings=x.sharding)(key))
    return jax.tree.unflatten(structure, made)


def time_step(
    size: str, remat: str, k: int, batch: int, microbatch: int, repeats: int, dropout: float
) -> dict:
    """Median seconds of a step, MFU where the device's peak is known, and peak memory."""
    config, prompt = SIZES[size]
    mesh = one_device()
    graphdef, lora, base = abstract_model(
        config, LoraConfig(dropout=dropout), jnp.bfloat16, remat, mesh
    )
    lora, base = random_state(lora, 0), random_state(base, 1)
    logp = make_logp(graphdef, "shared_prefix")
    key = jax.random.key(0) if dropout else None
    objective = make_objective("sdpo")
    step, state = build_step(logp, objective, paper_optimizer(), lora, mesh, dropout_key=key)
    examples = workload.equal_examples(batch, k, prompt)
    rows = batch // microbatch
    arrays = loader.collate(examples, loader.choose_shapes([examples], rows)[0], rows)
    arrays = {name: jnp.asarray(x.reshape(rows, -1, *x.shape[1:])) for name, x in arrays.items()}
    arrays["reference_logp_BMC"] = jnp.zeros((rows, microbatch, 1, k + 1))
    started = time.perf_counter()
    compiled = step.lower(state, base, arrays).compile()
    compile_seconds = time.perf_counter() - started
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        state, metrics = compiled(state, base, arrays)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[1:])
    device = jax.devices()[0]
    parameters = sum(x.size for x in jax.tree.leaves(base))
    flops = device_stats.model_flops(parameters, sum(example.tokens for example in examples))
    peak = device_stats.peak_flops(device, "bfloat16")
    return {
        "size": size,
        "remat": remat,
        "k": k,
        "batch": batch,
        "microbatch": microbatch,
        "dropout": dropout,
        "seconds": median,
        "examples_per_second": batch / median,
        "tflops": flops / median / 1e12,
        "mfu": flops / median / peak if peak else None,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        "compile_seconds": compile_seconds,
    }


def time_official(size: str, k: int, batch: int, repeats: int) -> dict:
    """Median seconds of the official recipe's step, and peak memory.

    Raises InputError if PyTorch is missing.
    """
    try:
        import torch

        from benchmarks.torch_sides import OfficialSide, random_model
    except ImportError as error:
        raise InputError(f"--official: {error}: pip install -e '.[bench]'") from error
    config, prompt = SIZES[size]
    side = OfficialSide(random_model(config), checkpointing=True)
    run, facts = side.prepare(workload.equal_examples(batch, k, prompt))
    median = statistics.median(run() for _ in range(repeats))
    return {
        "size": size,
        "side": "official",
        "k": k,
        "batch": batch,
        "seconds": median,
        "examples_at_once": facts["examples_at_once"],
        "examples_per_second": batch / median,
        "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def benchmark(
    size: str,
    remats: Sequence[str],
    ks: Sequence[int],
    batch: int,
    microbatches: Sequence[int],
    repeats: int,
    dropout: float = 0.1,
) -> dict:
    """Every combination; one that does not fit is reported and left out."""
    rows = []
    for remat, k, microbatch in itertools.product(remats, ks, microbatches):
        name = f"remat {remat:6} K={k:<3} microbatch {microbatch:<3}"
        try:
            row = time_step(size, remat, k, batch, microbatch, repeats, dropout)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name} does not fit")
            continue
        rows.append(row)
        mfu = f"{row['mfu']:.3f}" if row["mfu"] else "unknown"
        print(
            f"{name} {row['seconds']:8.3f} s  {row['examples_per_second']:8.2f} examples/s  "
            f"{row['tflops']:7.1f} TFLOP/s  MFU {mfu}",
            flush=True,
        )
    return {**workload.environment(), "dtype": "bfloat16", "repeats": repeats, "steps": rows}


def numbers(name: str, values: Sequence[str]) -> list[int]:
    """The positive integers of a list flag. Raises InputError."""
    if not all(v.isdecimal() and int(v) > 0 for v in values):
        raise InputError(f"--{name}: found {','.join(values)}, expected whole numbers above 0")
    return [int(v) for v in values]


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    set_up_jax("bfloat16")
    microbatches = numbers("microbatch", args.microbatch)
    if not args.official and any(args.batch % m for m in microbatches):
        raise InputError(
            f"--microbatch: found {args.microbatch}, expected divisors of {args.batch}"
        )
    if unknown := set(args.remat) - set(REMAT):
        raise InputError(
            f"--remat: found {', '.join(unknown)}, expected some of {', '.join(REMAT)}"
        )
    ks = numbers("k", args.k)
    if args.official:
        steps = [time_official(args.size, k, args.batch, args.repeats) for k in ks]
        result = {**workload.environment(), "dtype": "bfloat16", "steps": steps}
    else:
        result = benchmark(
            args.size, args.remat, ks, args.batch, microbatches, args.repeats, args.dropout
        )
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_enum("size", "7b", list(SIZES), "shape of the model")
    flags.DEFINE_list("k", ["3", "15"], "numbers of negatives")
    flags.DEFINE_integer("batch", 128, "examples per step", lower_bound=1)
    flags.DEFINE_list("microbatch", ["8"], "examples at once, several with commas")
    flags.DEFINE_list("remat", ["full"], "recomputation in the backward pass")
    flags.DEFINE_float("dropout", 0.1, "of the adapter's input; the config's own")
    flags.DEFINE_bool("official", False, "the official recipe's step in PyTorch, on a GPU")
    flags.DEFINE_integer("repeats", 3, "timed steps", lower_bound=1)
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
