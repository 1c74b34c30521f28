"""One optimizer step of S-DPO, side by side.

    python -m benchmarks.step --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --sides=official,strong,trl,ours --k=1,3,5,8,15 --batch=4 --repeats=5 --output=FILE.json

All sides get the same token ids of real prompts and take turns within every repeat. A ratio is the
median of the ratios of targets per second within a repeat. The time of every side includes the
reference, and the sides' log-probs are compared before the timing. FLOPs are those of the matrix
products. K = 0 is a step of SFT.
Sides: `ours`, `strong` (K+1 full rows in JAX), `official`, `official-keep`, `trl`, `trl-best`.
--prompts=candidates,history adds the side `history`: our step on --batch segments of histories, in
which each title is a target.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from absl import flags

from benchmarks import workload
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import set_up_jax

JAX_SIDES = ("ours", "strong")
TORCH_SIDES = ("official", "official-keep", "trl", "trl-best")
# Reported speed-ups: the first side's targets per second over the second's.
PAIRS = (
    *(("ours", name) for name in ("strong", *TORCH_SIDES)),
    *(("history", name) for name in ("ours", "official")),
)
TOLERANCE = 0.02  # nats per title (of 20 to 40): other libraries sum in another order
PAUSE = 0.3  # seconds, in which the threads of the previous side go to sleep


def make_sides(names: Sequence[str], model: Path, dtype: str) -> dict:
    """Name -> side. Those whose packages are missing are reported in one line and left out.

    Raises InputError for PyTorch sides in another dtype than float32.
    """
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
        raise InputError(f"--dtype: found {dtype}, expected float32 for the PyTorch sides")
    theirs = None
    for name in wanted:
        if name.startswith("official"):
            theirs = theirs or torch_model(model)
            made[name] = OfficialSide(theirs, checkpointing=name == "official")
        else:
            made[name] = TrlSide(torch_model(model), workload.load_tokenizer(model), "best" in name)
    return {name: made[name] for name in names}


def measure(
    sides: dict,
    examples: Sequence,
    repeats: int,
    others: Mapping[str, tuple] = MappingProxyType({}),
) -> tuple[dict, dict]:
    """Seconds of each repeat, and the facts of each side.

    `others`: name -> (side, examples) of sides that are timed on other examples.
    """
    ready = {name: side.prepare(examples) for name, side in sides.items()}
    check_log_probs({name: facts.pop("logp_XC", None) for name, (_, facts) in ready.items()})
    ready |= {name: side.prepare(theirs) for name, (side, theirs) in others.items()}
    for name in others:
        ready[name][1].pop("logp_XC")
    seconds = {name: [] for name in ready}
    for _ in range(repeats):
        for name, (run, _) in ready.items():
            time.sleep(PAUSE)
            seconds[name].append(run())
    return seconds, {name: facts for name, (_, facts) in ready.items()}


def check_log_probs(found: dict) -> None:
    """Raises InputError if the log-probs of two sides differ; None is a side without them."""
    known = {name: logp_XC for name, logp_XC in found.items() if logp_XC is not None}
    expected = next(iter(known.values()), None)
    for name, logp_XC in known.items():
        difference = float(np.abs(logp_XC - expected).max())
        if not difference < TOLERANCE:
            raise InputError(
                f"side {name}: found log-probs that differ by {difference:.2g} from "
                f"{next(iter(known))}'s, expected less than {TOLERANCE}: nothing was timed"
            )


def benchmark(
    model: Path,
    dataset: Path,
    names: Sequence[str],
    ks: Sequence[int],
    batch: int,
    repeats: int,
    dtype: str,
    prompts: Sequence[str] = ("candidates",),
) -> dict:
    """The result as `main` writes it."""
    work = workload.read_workload(model, dataset)
    segments = workload.read_workload(model, dataset, prompt="history")
    sides = make_sides(names, model, dtype)
    result = {
        "batch": batch,
        "dtype": dtype,
        "repeats": repeats,
        **workload.environment(),
        "model": str(model),
        "dataset": str(dataset),
        "shapes": {},
        "facts": {},
        "targets_per_second": {},
        "ratio": {},
    }
    for k in ks:
        examples = work.examples(batch, k)
        # TRL takes pairs only.
        able = {n: side for n, side in sides.items() if k == 1 or not n.startswith("trl")}
        if not able:
            continue
        others, targets = {}, dict.fromkeys(able, batch)
        if "history" in prompts:
            others["history"] = (sides["ours"], segments.examples(batch, k))
            targets["history"] = sum(example.M for example in others["history"][1])
        seconds, facts = measure(able, examples, repeats, others)
        result["shapes"][str(k)] = workload.lengths(examples)
        result["facts"][str(k)] = facts
        speeds = {n: [targets[n] / value for value in values] for n, values in seconds.items()}
        for name, values in speeds.items():
            speed = workload.spread_of(values)
            result["targets_per_second"].setdefault(name, {})[str(k)] = speed
            print(
                f"K={k:<3} {name:14} {speed['median']:8.3f} targets/s "
                f"[{speed['min']:.3f}, {speed['max']:.3f}]",
                flush=True,
            )
        for first, second in PAIRS:
            if first in speeds and second in speeds:
                pairs = zip(speeds[first], speeds[second], strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
                flops = {n: facts[n]["flops"] / targets[n] for n in (first, second)}
                less = flops[second] / flops[first]
                result["ratio"].setdefault(f"{first}/{second}", {})[str(k)] = ratio
                print(f"K={k:<3} {first} / {second}: {ratio:.2f} ({less:.2f} by FLOPs)", flush=True)
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
        raise InputError(f"--k: found {','.join(args.k)}, expected whole numbers, such as 1,3,5")
    if args.prompts not in (["candidates"], ["candidates", "history"]):
        raise InputError(
            f"--prompts: found {','.join(args.prompts)}, expected candidates or candidates,history"
        )
    if "history" in args.prompts and "ours" not in args.sides:
        raise InputError("--sides: found no ours, expected it with --prompts=candidates,history")
    ks = [int(k) for k in args.k]
    result = benchmark(
        Path(args.model),
        Path(args.dataset),
        args.sides,
        ks,
        args.batch,
        args.repeats,
        args.dtype,
        args.prompts,
    )
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_list("sides", ["official", "strong", "trl", "ours"], "sides to measure")
    flags.DEFINE_list("prompts", ["candidates"], "candidates, or candidates,history")
    flags.DEFINE_list("k", ["1", "3", "5", "8", "15"], "numbers of negatives")
    flags.DEFINE_integer("batch", 4, "examples per step", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "timed steps per side", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of base and products")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
