"""All that only an accelerator can show, in one command of nine minutes.

    make gpu OUT=folder
    python -m benchmarks.gpu --output=folder --model=MODEL --dataset=DATA     # the same

Parts run one after the other, the most valuable first. Each has a time limit and leaves its files
in the folder; `summary.json` is written after every part. The same command goes on at the first
part without a result; `--parts` names those to run again. The exit status is 1 where a part failed
or ran out of time. `--size=toy` runs everything on a CPU in a few minutes.

The machine needs no network. `benchmarks/gpu-wheels.txt` lists the packages to bring.
"""

import configparser
import dataclasses
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from packaging.requirements import Requirement

from sdpo_jax.reproduction.cells import DATASETS
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import read_object, write_json

GRACE = 5  # seconds from SIGTERM to SIGKILL


@dataclasses.dataclass(frozen=True)
class Part:
    """Commands that share a time limit in seconds; a failing one ends the part."""

    name: str
    limit: float
    commands: tuple[tuple[str, ...], ...]


def module(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *arguments)


def training(config: str, run: Path, dataset: str, model: Path, *more: str) -> tuple[str, ...]:
    paths = (f"--workdir={run}", f"--config.dataset={dataset}", f"--config.model={model}")
    return module("sdpo_jax.train", f"--config={config}", *paths, *more)


def parts(args, out: Path) -> list[Part]:
    """The parts in their order; those without their inputs are left out."""
    toy = args.size == "toy"
    model, work = Path(args.model), out / "work"
    converted = model if (model / "model.json").exists() else work / "model"
    found = [Part("parity", 70, (module("benchmarks.parity", f"--output={out}/parity.json"),))]
    if converted != model:
        found.append(
            Part(
                "convert",
                60,
                (module("sdpo_jax.convert", f"--model={model}", f"--output={converted}"),),
            )
        )
    found.append(_histories(args.dataset, converted, work, out, toy))
    found.append(_large(out, toy))
    found.append(_resume(args.dataset, converted, work, out))
    found += [_candidates(dataset, converted, work, toy) for dataset in args.candidates]
    size = f"--size={args.size}"
    found.append(
        Part(
            "attention",
            20,
            (module("benchmarks.kernels", size, f"--output={out}/attention.json"),),
        )
    )
    found.append(_official(out, toy))
    if args.study:
        found.append(_study(args.study, converted, toy))
    return found


def _histories(dataset: str, model: Path, work: Path, out: Path, toy: bool) -> Part:
    """Three epochs of SFT and one of S-DPO, HR@1 and the catalogue's metrics, and the adapter."""
    run = work / "histories"
    short = ("--config.sft.max_steps=2", "--config.sdpo.max_steps=2") if toy else ()
    windows, whole = (8, 8) if toy else (2000, 500)
    config = "configs/history.py" + (":smoke" if toy else "")
    here = (f"--workdir={run}", "--split=test_all")
    return Part(
        "histories",
        170,
        (
            training(config, run, dataset, model, *short),
            module(
                "sdpo_jax.evaluate",
                *here,
                "--stage=base,sft,sdpo",
                "--decoder=score",
                f"--limit={windows}",
            ),
            module(
                "sdpo_jax.evaluate",
                *here,
                "--stage=sdpo",
                "--rank=catalogue",
                "--decoder=beam",
                f"--limit={whole}",
            ),
            module(
                "sdpo_jax.export",
                f"--workdir={run}",
                "--stage=sdpo",
                "--format=peft",
                f"--output={out}/adapter",
            ),
        ),
    )


def _large(out: Path, toy: bool) -> Part:
    """The 7B shape with the config's dropout at the two settings that are best by the model."""
    shape = ("--size=toy", "--batch=4") if toy else ("--batch=128", "--repeats=2")
    microbatches = "2" if toy else "16,32"
    return Part(
        "large",
        140,
        (
            module(
                "benchmarks.large",
                *shape,
                "--k=3,15",
                f"--microbatch={microbatches}",
                "--remat=cheap",
                f"--output={out}/large.json",
            ),
        ),
    )


def _resume(dataset: str, model: Path, work: Path, out: Path) -> Part:
    """Whether a run that was killed ends with the same bits as one that was not."""
    here = (f"--dataset={dataset}", f"--model={model}", f"--work={work}")
    return Part("resume", 45, (module("benchmarks.resume", *here, f"--output={out}/resume.json"),))


def _candidates(dataset: str, model: Path, work: Path, toy: bool) -> Part:
    """The paper's prompts: all windows of a data set once in each stage."""
    name = Path(dataset).parent.name if Path(dataset).name == "data" else Path(dataset).name
    run = work / f"candidates-{name}"
    config = f"configs/movielens.py:{'smoke' if toy else 'medium'}"
    return Part(
        f"candidates-{name}",
        60,
        (
            training(config, run, dataset, model),
            module(
                "sdpo_jax.evaluate",
                f"--workdir={run}",
                "--stage=base,sft,sdpo",
                "--decoder=greedy,score",
                f"--limit={8 if toy else 400}",
            ),
        ),
    )


def _study(folder: str, model: Path, toy: bool) -> Part:
    """The study on histories, as far as it comes, on the data sets prepared in the folder."""
    prepared = [name for name in DATASETS if (Path(folder) / name / "data").is_dir()]
    command = module(
        "sdpo_jax.reproduce",
        "--target=history",
        f"--scale={'smoke' if toy else 'medium'}",
        f"--workdir={folder}",
        f"--model={model}",
        f"--datasets={','.join(prepared)}",
        "--jobs=6",
    )
    return Part("study", 540, (command,))


def _official(out: Path, toy: bool) -> Part:
    shape = ("--size=toy", "--batch=4") if toy else ("--batch=8",)
    command = module(
        "benchmarks.large",
        "--official",
        *shape,
        "--k=3",
        "--repeats=2",
        f"--output={out}/official.json",
    )
    return Part("official", 35, (command,))


def check_versions() -> None:
    """Raises InputError for packages that are missing here, or are not of the versions needed."""
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg")
    wrong = []
    for line in settings["options"]["install_requires"].split():
        needed = Requirement(line)
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            found = "no version"
        if not needed.specifier.contains(found if found[0].isdigit() else "0"):
            wrong.append(f"{needed.name} {found}, expected {needed.specifier}")
    if wrong:
        raise InputError(f"found {'; '.join(wrong)}: bring wheels, see benchmarks/gpu-wheels.txt")


def run_part(part: Part, log: Path, limit: float) -> dict:
    """Runs the commands of a part; a command that is too slow is killed with its children."""
    started = time.monotonic()
    status, reason = 0, "done"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        for command in part.commands:
            print(" ".join(command[1:]), file=file, flush=True)
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )
            try:
                status = process.wait(max(0.1, limit - (time.monotonic() - started)))
                reason = "done" if status == 0 else "failed"
            except subprocess.TimeoutExpired:
                _kill(process)
                status, reason = 124, f"cut after {limit:.0f} s"
            if status:
                break
    return {"status": status, "found": reason, "seconds": round(time.monotonic() - started, 1)}


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def keep_results(out: Path) -> None:
    """Copies the small files of the runs, such as metrics and evaluations, beside the logs."""
    for run in (out / "work").glob("*"):
        for name in ("eval", "stages", "metrics"):
            if (run / name).is_dir():
                shutil.copytree(run / name, out / run.name / name, dirs_exist_ok=True)


def run_parts(todo: Sequence[Part], out: Path, only: Sequence[str] = (), cut: float = 0) -> dict:
    """Runs the parts that have no result, or those that `only` names; returns the summary.

    `cut`: seconds after which every part ends. Raises InputError for an unknown name.
    """
    if unknown := set(only) - {part.name for part in todo}:
        raise InputError(
            f"--parts: found {', '.join(sorted(unknown))}, expected some of "
            f"{', '.join(part.name for part in todo)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    file = out / "summary.json"
    summary = read_object(file, "expected a summary of benchmarks.gpu") if file.exists() else {}
    for part in todo:
        done = summary.get(part.name, {}).get("status") == 0
        if part.name not in only if only else done:
            continue
        limit = min(part.limit, cut) if cut else part.limit
        found = summary[part.name] = run_part(part, out / f"{part.name}.log", limit)
        keep_results(out)
        write_json(file, summary)
        print(f"{part.name}: {found['found']}, {found['seconds']} s", flush=True)
    return summary


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    check_versions()
    out = Path(args.output)
    summary = run_parts(parts(args, out), out, args.parts, args.cut)
    if failed := [name for name, found in summary.items() if found["status"]]:
        print(f"not finished: {', '.join(failed)}: their logs are in {out}")
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder of the results", required=True)
    flags.DEFINE_string(
        "model", "runs/quickstart/model", "folder written by sdpo_jax.convert, or what it reads"
    )
    flags.DEFINE_string("dataset", "runs/quickstart/data", "folder written by sdpo_jax.prepare")
    flags.DEFINE_list("candidates", [], "more such folders, for the paper's prompts")
    flags.DEFINE_string(
        "study", "", "folder of prepared data sets, DATASET/data, for reproduce --target=history"
    )
    flags.DEFINE_list("parts", [], "run these, also where they are done; default: all that are not")
    flags.DEFINE_enum("size", "7b", ["7b", "toy"], "shape of the large step, length of the runs")
    flags.DEFINE_float("cut", 0, "end every part after this many seconds: a rehearsal")
    run_command(main)
