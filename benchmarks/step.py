"""One optimizer step of S-DPO, side by side.

    python -m benchmarks.step --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --sides=official,strong,trl,ours --k=1,3,5,8,15 --batch=4 --repeats=5 --output=FILE.json

All sides get the same token ids of real prompts and take their turns within every repeat; a ratio
is the median of the ratios of targets per second within a repeat. The cost of the reference is in
every side's time, and the sides' log-probs are compared before anything is timed. FLOPs are those
of the matrix products. K = 0 is a step of SFT.
Sides: `ours`, `strong` (K+1 full rows in JAX), `official`, `official-keep`, `trl`, `trl-best`.
With --prompts=candidates,history there is one more, `history`: our step on --batch segments of
histories, each title of which is a target.
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
# Speed-ups that are told: the first side's targets per second over the second's.
PAIRS = (
    *(("ours", name) for name in ("strong", *TORCH_SIDES)),
    *(("history", name) for name in ("ours", "official")),
)
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


def measure(
    sides: dict,
    examples: Sequence,
    repeats: int,
    others: Mapping[str, tuple] = MappingProxyType({}),
) -> tuple[dict, dict]:
    """Seconds of each repeat, and each side's own facts.

    `others`: name -> (side, examples) of what is timed on examples of its own.
    """
    ready = {name: side.prepare(examples) for name, side in sides.items()}
    check_log_probs({name: facts.pop("logp_NC", None) for name, (_, facts) in ready.items()})
    ready |= {name: side.prepare(of_side) for name, (side, of_side) in others.items()}
    for name in others:
        ready[name][1].pop("logp_NC")
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
        raise InputError(f"--k: found {','.join(args.k)}, expected whole numbers, as 1,3,5")
    if args.prompts != ["candidates"] and args.prompts != ["candidates", "history"]:
        raise InputError(
            f"--prompts: found {','.join(args.prompts)}, expected candidates or candidates,history"
        )
    if "history" in args.prompts and "ours" not in args.sides:
        raise InputError("--sides: found no ours, expected it beside --prompts=candidates,history")
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
    flags.DEFINE_string("model", None, "folder of sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder of sdpo_jax.prepare", required=True)
    flags.DEFINE_list("sides", ["official", "strong", "trl", "ours"], "which to measure")
    flags.DEFINE_list("prompts", ["candidates"], "candidates, or candidates,history")
    flags.DEFINE_list("k", ["1", "3", "5", "8", "15"], "numbers of negatives")
    flags.DEFINE_integer("batch", 4, "examples per step", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "timed steps of each side", lower_bound=1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of base and products")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
