"""One optimizer step of S-DPO, side by side.

    python -m benchmarks.step --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --sides=official,strong,trl,ours --k=1,3,5,8,15 --batch=4 --repeats=5 --output=FILE.json

All sides get the same token ids of real prompts and take their turns within every repeat; a ratio
is the median of the ratios within a repeat. The cost of the reference is in every side's time, and
the sides' log-probs are compared before anything is timed. FLOPs are those of the matrix products.
K = 0 is a step of SFT.
Sides: `ours`, `strong` (K+1 full rows in JAX), `official`, `official-keep`, `trl`, `trl-best`.
"""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import workload
from sdpo_jax.errors import InputError, run_command
from sdpo_jax.runtime import set_up_jax

JAX_SIDES = ("ours", "strong")
TORCH_SIDES = ("official", "official-keep", "trl", "trl-best")
TOLERANCE = 0.02  # nats a title, of 20 to 40, summed in another order by another library
PAUSE = 0.3  # seconds in which the threads of the side before go to sleep


def make_sides(names: Sequence[str], model: Path, dtype: str) -> dict:
    """Name -> side. One whose packages are missing says so in one line and is left out."""
    from benchmarks.jax_sides import JaxSide

    made = {name: JaxSide(name, model, dtype) for name in names if name in JAX_SIDES}
    wanted = [name for name in names if name in TORCH_SIDES]
    if not wanted:
        return made
    try:
        from benchmarks.torch_sides import OfficialSide, TrlSide, torch_model
    except ImportError as error:
        print(f"left out: {', '.join(wanted)} ({error}): pip install -e '.[bench]'")
        return made
    if dtype != "float32":
        raise InputError(f"--dtype: found {dtype}, the PyTorch sides are float32")
    theirs = None
    for name in wanted:
        if name.startswith("official"):
            theirs = theirs or torch_model(model)
            made[name] = OfficialSide(theirs, checkpointing=name == "official")
        else:
            made[name] = TrlSide(torch_model(model), workload.load_tokenizer(model), "best" in name)
    return {name: made[name] for name in names}


def measure(sides: dict, examples: Sequence, repeats: int) -> tuple[dict, dict]:
    """Seconds of each repeat, and each side's own facts."""
    ready = {name: side.prepare(examples) for name, side in sides.items()}
    check_log_probs({name: facts.pop("logp_NC", None) for name, (_, facts) in ready.items()})
    seconds = {name: [] for name in ready}
    for _ in range(repeats):
        for name, (run, _) in ready.items():
            time.sleep(PAUSE)
            seconds[name].append(run())
    return seconds, {name: facts for name, (_, facts) in ready.items()}


def check_log_probs(found: dict) -> None:
    """All sides that tell their log-probs must tell the same ones."""
    told = {name: logp_NC for name, logp_NC in found.items() if logp_NC is not None}
    expected = next(iter(told.values()), None)
    for name, logp_NC in told.items():
        difference = float(np.abs(logp_NC - expected).max())
        if not difference < TOLERANCE:
            raise InputError(
                f"side {name}: found log-probs that differ by {difference:.2g} from "
                f"{next(iter(told))}'s, expected less than {TOLERANCE}: nothing was timed"
            )


def benchmark(model: Path, dataset: Path, names: Sequence[str], ks: Sequence[int], batch: int,
              repeats: int, dtype: str) -> dict:  # fmt: skip
    """The result as `main` writes it."""
    work = workload.read_workload(model, dataset)
    sides = make_sides(names, model, dtype)
    result = {"batch": batch, "dtype": dtype, "repeats": repeats, **workload.environment(),
              "model": str(model), "dataset": str(dataset), "shapes": {}, "facts": {},
              "examples_per_second": {name: {} for name in sides}, "ratio": {}}  # fmt: skip
    for k in ks:
        examples = work.examples(batch, k)
        # TRL takes pairs only.
        able = {n: side for n, side in sides.items() if k == 1 or not n.startswith("trl")}
        if not able:
            continue
        seconds, facts = measure(able, examples, repeats)
        result["shapes"][str(k)] = workload.lengths(examples)
        result["facts"][str(k)] = facts
        for name, values in seconds.items():
            speed = workload.spread_of([batch / value for value in values])
            result["examples_per_second"][name][str(k)] = speed
            print(f"K={k:<3} {name:14} {speed['median']:8.3f} examples/s "
                  f"[{speed['min']:.3f}, {speed['max']:.3f}]", flush=True)  # fmt: skip
        for name in seconds:
            if name != "ours" and "ours" in seconds:
                pairs = zip(seconds[name], seconds["ours"], strict=True)
                ratio = statistics.median(theirs / mine for theirs, mine in pairs)
                less = facts[name]["flops"] / facts["ours"]["flops"]
                result["ratio"].setdefault(f"ours/{name}", {})[str(k)] = ratio
                print(f"K={k:<3} ours / {name}: {ratio:.2f} ({less:.2f} by FLOPs)", flush=True)
    return result


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    set_up_jax(args.dtype)
    unknown = set(args.sides) - {*JAX_SIDES, *TORCH_SIDES}
    if unknown:
        raise InputError(
            f"--sides: found {', '.join(sorted(unknown))}, expected some of "
            f"{', '.join((*JAX_SIDES, *TORCH_SIDES))}"
        )
    if not all(k.isdecimal() for k in args.k):
        raise InputError(f"--k: found {','.join(args.k)}, expected whole numbers, as 1,3,5")
    ks = [int(k) for k in args.k]
    result = benchmark(Path(args.model), Path(args.dataset), args.sides, ks, args.batch,
                       args.repeats, args.dtype)  # fmt: skip
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder of sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder of sdpo_jax.prepare", required=True)
    flags.DEFINE_list("sides", ["official", "strong", "trl", "ours"], "which to measure")
    flags.DEFINE_list("k", ["1", "3", "5", "8", "15"], "numbers of negatives")
    flags.DEFINE_integer("batch", 4, "examples a step", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "timed steps of each side", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of base and products")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
