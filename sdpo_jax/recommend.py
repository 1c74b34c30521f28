"""Recommends items to a person, or to each person of a file.

    python -m sdpo_jax.recommend --workdir=runs/quickstart/run --history="Toy Story; Aladdin"
    python -m sdpo_jax.recommend --workdir=runs/quickstart/run --input=people.jsonl --output=FILE

A history has titles, oldest first, or ids of items; a line of the file is {"history": […], …}, and
its other keys are kept. The same command goes on with a file that it did not finish. `--candidates`
ranks these titles alone. Scores are log-probabilities of titles; the share is that of a title's
probability among those listed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sdpo_jax.reports.tables import markdown
from sdpo_jax.serving.recommender import BEAMS, METHODS, Recommender
from sdpo_jax.serving.scoring import as_records, score_file
from sdpo_jax.serving.sources import of_flags
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError


def titles_of(text: str) -> list[int | str]:
    """Titles, or ids where a part has only digits, separated by semicolons."""
    parts = [part.strip() for part in text.split(";")]
    return [int(part) if part.isdecimal() else part for part in parts if part]


def filters(given: Sequence[str]) -> dict[str, str]:
    """`key=value` pairs. Raises InputError."""
    pairs = [text.partition("=") for text in given]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        raise InputError(f"--where: found {wrong[0]!r}, expected attribute=value")
    return {key: value for key, _, value in pairs}


def shares(scores: Sequence[float]) -> list[float]:
    """Each probability as a share of their sum."""
    most = max(scores, default=0.0)
    weights = [math.exp(score - most) for score in scores]
    return [weight / sum(weights) for weight in weights]


def show(listed: Sequence[tuple[str, float]]) -> str:
    """A table of titles, scores and shares."""
    parts = shares([score for _, score in listed])
    rows = [
        [str(n), title, f"{score:.2f}", f"{share:.0%}"]
        for n, ((title, score), share) in enumerate(zip(listed, parts, strict=True), 1)
    ]
    return "\n".join(markdown([["", "title", "log-prob", "share"], *rows]))


def options_of(args: Any) -> dict[str, Any]:
    """The arguments of `Recommender.ranked`."""
    return {
        "k": args.k,
        "exclude_seen": args.exclude_seen,
        "where": filters(args.where),
        "fuzzy": args.fuzzy,
        "method": args.method,
    }


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    if bool(args.history) == bool(args.input):
        raise InputError("found neither or both of --history and --input, expected one of them")
    if bool(args.input) != bool(args.output):
        raise InputError("--output: expected it with --input and only with it")
    if args.input and (args.candidates or args.json):
        raise InputError("--candidates, --json: found one beside --input, expected --history")
    stages = (args.stage,) if args.stage else None
    if args.workdir and not stages:
        stages = ("sdpo",)
    source = of_flags(args.workdir, args.bundle, args.model, args.adapter, args.catalogue, stages)
    recommender = Recommender(source, beams=args.beams)
    if args.input:
        count = score_file(recommender, Path(args.input), Path(args.output), **options_of(args))
        print(f"{args.output}: recommendations for {count} people")
        return
    history = titles_of(args.history)
    if args.candidates:
        listed = recommender.rank(history, titles_of(args.candidates))
        records: list[dict[str, Any]] = [{"title": t, "score": score} for t, score in listed]
    else:
        (ranked,) = recommender.ranked([history], **options_of(args))
        titles = recommender.index.told_apart([one.item for one in ranked])
        listed = [(title, one.score) for title, one in zip(titles, ranked, strict=True)]
        records = as_records(ranked)
    print(json.dumps({"items": records}, ensure_ascii=False) if args.json else show(listed))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "folder of the run")
    flags.DEFINE_string("bundle", "", "folder of export --format=bundle, instead of a run")
    flags.DEFINE_string("model", "", "converted model, alone or as the base of a bundle's adapter")
    flags.DEFINE_string("adapter", "", "folder of PEFT's adapter, with --model")
    flags.DEFINE_string("catalogue", "", "folder of prepare, or items.jsonl, with --model")
    flags.DEFINE_string("stage", "", "of the run: base, sft or sdpo (the default)")
    flags.DEFINE_string("history", "", "titles or ids, oldest first, separated by semicolons")
    flags.DEFINE_string("candidates", "", "rank these titles instead of the catalogue")
    flags.DEFINE_integer("k", 10, "number of items", lower_bound=1)
    flags.DEFINE_bool("exclude_seen", True, "leave out the history")
    flags.DEFINE_list("where", [], "attribute=value of items, several with commas")
    flags.DEFINE_bool("fuzzy", False, "take the nearest title for an unknown one")
    flags.DEFINE_enum("method", "beam", METHODS, "beam search, or every title's log-probability")
    flags.DEFINE_integer("beams", BEAMS, "width of the beam", lower_bound=1)
    flags.DEFINE_bool("json", False, "print JSON instead of a table")
    flags.DEFINE_string("input", "", "JSONL file of histories")
    flags.DEFINE_string("output", "", "JSONL file to write")
    run_command(main)
