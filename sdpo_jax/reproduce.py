"""Reproduces the S-DPO paper's tables and figures on one page.

    python -m sdpo_jax.reproduce --target=table1 --scale=smoke --workdir=runs/tables
    python -m sdpo_jax.reproduce --target=all --scale=paper --workdir=runs/paper \\
        --model=runs/llama2-7b --lastfm=FOLDER --goodreads=FOLDER

Scale `smoke` is a few steps of a small model, to test the setup; `small` a few hundred examples per
stage with it, hours on a CPU; `medium` every training window once, for one GPU; `paper` the paper's
setting with your model. Each cell of a table is a workdir below --workdir. The same command resumes
after a stop, and another target adds to the same page: reproduce.html, which is self-contained, and
reproduce.md.
"""

import functools
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sdpo_jax.reports.document import to_html, to_markdown
from sdpo_jax.reproduction import page
from sdpo_jax.reproduction.cells import (
    BACKBONES,
    DATASETS,
    KEYS,
    SCALES,
    Study,
    left_out,
)
from sdpo_jax.reproduction.plan import TARGETS, plan
from sdpo_jax.reproduction.running import Stopped, pasted, run
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import TEXT, Kind, check_keys, read_json, whole_file, write_json

ASKED = "reproduce.json"  # targets and options of a folder so far
FIXED = ("scale", "model", "options")  # the same for all figures of a page
# Can be added later, but not changed: cells are made with them.
ADDED = (*DATASETS, *BACKBONES, "endpoint", "chat_model")


def reproduce(
    workdir: str | Path, asked: Mapping[str, Any], dry_run: bool = False, jobs: int = 1
) -> bool:
    """Runs the remaining cells of `asked` and writes the page; returns whether none failed.

    Args:
      workdir: folder of the cells and the page.
      asked: "wanted", target -> data sets; "scale", "model", "options"; the data sets, the
        backbones, "endpoint" and "chat_model": each "" if not given.
      dry_run: only print the commands.
      jobs: cells at once.

    Raises InputError for options that do not fit, and Stopped after a signal.
    """
    root = Path(workdir)
    known = merged(root, asked)
    study = study_of(root, known)
    cells = plan(study, asked["wanted"])
    for dataset in dict.fromkeys(itertools.chain(*asked["wanted"].values())):
        if why := left_out(study, dataset):
            print(f"{dataset}: {why}")
    if dry_run:
        print("\n".join(pasted(step.command) for cell in cells for step in cell.left()))
        return True
    try:
        write_json(root / ASKED, known)
        write = functools.partial(write_page, study, known["wanted"])
        failed = run(cells, root, sparingly(write), jobs)
        write(failed)
    except OSError as error:
        raise InputError(
            f"{root}: cannot be written ({error.strerror}): free space, correct permissions or "
            "choose another --workdir"
        ) from error
    print(f"written to {root}/reproduce.html and {root}/reproduce.md")
    return not failed


def sparingly(write: Callable[[dict[Path, str]], object]) -> Callable[[dict[Path, str]], None]:
    """`write`, but not where it would take more than a twentieth of the time.

    A page of hundreds of evaluations takes a minute, in which no cell is started.
    """
    next_time = 0.0

    def called(failed: dict[Path, str]) -> None:
        nonlocal next_time
        if (start := time.monotonic()) < next_time:
            return
        write(failed)
        end = time.monotonic()
        next_time = end + 19 * (end - start)

    return called


def merged(root: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    """`asked` merged with the earlier requests in the same folder.

    Raises InputError if those had another scale, model, options, source or endpoint.
    """
    if not os.path.lexists(root / ASKED):
        return dict(asked)
    advice = "restore it or choose another --workdir"
    before = read_json(root / ASKED, f"expected targets and options: {advice}")
    check_keys(root / ASKED, before, {key: TEXT for key in FIXED} | {"wanted": WANTED}, advice)
    before = dict.fromkeys(ADDED, "") | before
    for key in (*FIXED, *ADDED):
        given = key in FIXED or (before[key] and asked[key])
        if given and before[key] != asked[key]:
            raise InputError(
                f"--{key}: found {brief(asked[key])}, expected {brief(before[key])} as in "
                f"{root / ASKED}: give that, or another --workdir"
            )
    wanted = {
        target: [name for name in DATASETS if name in both]
        for target in TARGETS
        if (both := (*before["wanted"].get(target, ()), *asked["wanted"].get(target, ())))
    }
    return before | {key: value for key, value in asked.items() if value} | {"wanted": wanted}


def _wanted(value: Any) -> bool:
    return type(value) is dict and all(
        target in TARGETS
        and type(datasets) is list
        and all(name in tuple(DATASETS) for name in datasets)
        for target, datasets in value.items()
    )


WANTED = Kind("targets with their data sets", _wanted)


def study_of(root: Path, asked: Mapping[str, Any]) -> Study:
    """The study of `asked`. Raises InputError if its scale needs a model."""
    scale = SCALES[asked["scale"]]
    if asked["scale"] == "paper" and not asked["model"]:
        raise InputError(
            "--model: found nothing, expected a folder of sdpo_jax.convert with Llama2-7B, as "
            "--scale=paper is the paper's setting: see docs/reproduce.md"
        )
    return Study(
        root,
        scale,
        asked["model"],
        options_of(asked["options"]),
        {name: asked[name] for name in DATASETS},
        {name: asked[name] for name in BACKBONES},
        asked["endpoint"],
        asked["chat_model"],
    )


def options_of(text: str) -> tuple[str, ...]:
    """Splits --options. Raises InputError for a malformed option or one with a key of KEYS."""
    try:
        options = tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"--options: found {text!r} ({error}), expected shell words") from error
    for option in options:
        key = option.removeprefix("--config.").partition("=")[0]
        if not option.startswith("--config.") or "=" not in option or key in KEYS:
            raise InputError(
                f"--options: found {option!r}, expected --config.KEY=VALUE with none of the keys "
                f"that define a cell ({', '.join(KEYS)}): leave it out"
            )
    return options


def write_page(
    study: Study, wanted: Mapping[str, Sequence[str]], failed: Mapping[Path, str]
) -> None:
    """Writes reproduce.html and reproduce.md, each atomically."""
    parts = page.parts(study, wanted, failed)
    for name, render in (("reproduce.html", to_html), ("reproduce.md", to_markdown)):
        with whole_file(study.root / name) as file:
            file.write_text(render(page.TITLE, parts), encoding="utf-8")


def check(flag: str, values: Sequence[str], known: Collection[str]) -> None:
    for value in values or [""]:
        if value not in known:
            raise InputError(f"--{flag}: found {value!r}, expected {', '.join(known)}")


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    check("target", args.target, ("all", *TARGETS))
    check("datasets", args.datasets, DATASETS)
    targets = [name for name in TARGETS if name in args.target or "all" in args.target]
    asked = {key: args[key].value for key in (*FIXED, *ADDED)}
    asked["wanted"] = {target: args.datasets for target in targets}
    try:
        complete = reproduce(args.workdir, asked, args.dry_run, args.jobs)
    except Stopped:
        print(f"stopped: the same command resumes from {args.workdir}")
        sys.exit(os.EX_TEMPFAIL)
    sys.exit(not complete)


if __name__ == "__main__":
    flags.DEFINE_list("target", ["all"], f"all, or a comma-separated list of {', '.join(TARGETS)}")
    flags.DEFINE_enum("scale", "smoke", list(SCALES), "how much is run")
    flags.DEFINE_string("workdir", None, "folder of the cells and the page", required=True)
    flags.DEFINE_list("datasets", list(DATASETS), "comma-separated")
    flags.DEFINE_string("movielens", "", "MovieLens' of any size; default: MovieLens-100K")
    flags.DEFINE_string("lastfm", "", "LastFM's raw files")
    flags.DEFINE_string("goodreads", "", "Goodreads' raw files")
    flags.DEFINE_string("amazon", "", "Amazon's raw files")
    flags.DEFINE_integer("jobs", 1, "cells at once: a GPU has room for several", lower_bound=1)
    flags.DEFINE_string("model", "", "folder of sdpo_jax.convert; default: the small model")
    for _name, _title in BACKBONES.items():
        flags.DEFINE_string(_name, "", f"folder of sdpo_jax.convert with {_title}, for table4")
    flags.DEFINE_string("options", "", "for every sdpo_jax.train: '--config.microbatch=2 …'")
    flags.DEFINE_string("endpoint", "", "OpenAI-compatible URL, for ChatRec")
    flags.DEFINE_string("chat_model", "", "model name at the endpoint, for ChatRec")
    flags.DEFINE_bool("dry_run", False, "only print the remaining commands")
    run_command(main)
