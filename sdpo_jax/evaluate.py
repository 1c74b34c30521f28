"""Evaluates checkpoints of a run, in a process of its own.

    python -m sdpo_jax.evaluate --workdir=runs/movielens/run --decoder=greedy,score
    python -m sdpo_jax.evaluate --workdir=runs/movielens/run --stage=base,sft,sdpo --split=test_all
    python -m sdpo_jax.evaluate --workdir=runs/movielens/run --follow --split=val

Decoders: `greedy` is the paper's metric (free generation, valid iff exactly one candidate is a
substring of it); `trie` generates among the candidates only; `score` ranks the candidates by
log-probability. The prompts are run once for all decoders.

    python -m sdpo_jax.evaluate --workdir=runs/quickstart/run --rank=catalogue --decoder=beam

ranks all items but the window's history, or all items where users have items repeatedly, for runs
with config.prompt=history: `beam` searches among the titles, `score` computes every title's
log-probability. `--rank=disliked --decoder=score` ranks the target against one item that the same
user rated low later on: HR@1 among these two is the AUC of liked against disliked.

Writes eval/<stage>-<step>-<decoder>.json and, beside it, the predictions as .jsonl. That name is of
the split evaluated last; results of another split are renamed to end in the split's name.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from sdpo_jax.data.tokens import NEW_TOKENS
from sdpo_jax.evaluation import results
from sdpo_jax.evaluation.evaluator import Evaluator
from sdpo_jax.runs.checkpoints import CheckpointGone
from sdpo_jax.runs.steps import adapter, choose_step, last_finished, steps
from sdpo_jax.runs.workdir import Run, read_run, stage_result
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError

# What is ranked -> the decoders that can.
DECODERS_OF = {
    "candidates": ("greedy", "trie", "score"),
    "catalogue": ("score", "beam"),
    "disliked": ("score",),
}
SPLITS = ("test", "val", "test_all", "val_all")


def evaluate(
    workdir: str | Path,
    stages: Sequence[str] = (),
    split: str = "test",
    decoders: Sequence[str] = ("greedy",),
    limit: int = 0,
    step: int | None = None,
    batch_size: int = 0,
    rank: str = "candidates",
    beams: int = 20,
) -> list[dict[str, Any]]:
    """Evaluates each stage at its best step, or at `step`; returns the summaries written.

    `stages` defaults to the last finished one. Raises InputError for an unknown workdir, stage,
    step, split or decoder before the model is loaded.
    """
    run = _open(workdir, stages, split, decoders, rank)
    stages = stages or [last_finished(run)]
    if step is not None and len(stages) > 1:
        raise InputError("--step: found several stages, expected one: give one --stage with it")
    chosen = [(stage, choose_step(run, stage, step)) for stage in stages]
    evaluator = Evaluator(run, split, limit, batch_size, rank, beams)
    _announce(evaluator, decoders)
    try:
        return [
            summary
            for stage, step in chosen
            for summary in _evaluate(run, evaluator, stage, step, decoders, limit)
        ]
    except CheckpointGone as error:
        raise InputError(
            f"{error}: found no readable checkpoint, expected one: was it deleted or is the run "
            "still going? use --follow, or --step for another"
        ) from error


def follow(
    workdir: str | Path,
    stages: Sequence[str] = (),
    split: str = "test",
    decoders: Sequence[str] = ("greedy",),
    limit: int = 0,
    batch_size: int = 0,
    poll_seconds: float = 5.0,
) -> list[dict[str, Any]]:
    """Evaluates every checkpoint of a run in progress once, until the run has ended.

    Only complete checkpoints are listed. One that the trainer deletes before it is read is skipped
    with a line. One that was evaluated before on the same windows is not read again.
    """
    run = _open(workdir, stages, split, decoders)
    stages = stages or list(run.config.stages)
    evaluator = Evaluator(run, split, limit, batch_size)
    _announce(evaluator, decoders)
    seen, written = set(), []
    while True:
        # Before the listing, so that a checkpoint written between the two is not missed.
        ended = stage_result(run.path, run.config.stages[-1]) is not None
        listed = [(stage, step) for stage in stages for step in steps(run, stage)]
        new = [key for key in listed if key not in seen]
        for stage, step in new:
            seen.add((stage, step))
            if _done_before(run, evaluator, stage, step, decoders):
                continue
            try:
                written += _evaluate(run, evaluator, stage, step, decoders, limit)
            except CheckpointGone:
                print(f"{stage} step {step}: deleted before it could be read, skipped", flush=True)
        if ended and not new:
            return written
        if not new:
            time.sleep(poll_seconds)


def _announce(evaluator: Evaluator, decoders: Sequence[str]) -> None:
    """Prints truncated prompts and an unusual limit of generated tokens."""
    if message := evaluator.encoder.truncation():
        print(message, flush=True)
    if "greedy" in decoders and evaluator.new_tokens != NEW_TOKENS:
        print(
            f"greedy generates up to {evaluator.new_tokens} tokens, as the longest title of the "
            f"data has more than {NEW_TOKENS}",
            flush=True,
        )


def _open(
    workdir: str | Path,
    stages: Sequence[str],
    split: str,
    decoders: Sequence[str],
    rank: str = "candidates",
) -> Run:
    run = read_run(Path(workdir))
    if rank != "candidates" and run.config.prompt != "history":
        raise InputError(
            f"--rank: found {rank} of a run whose prompts show the candidates "
            f"(config.prompt={run.config.prompt}), expected one with config.prompt=history"
        )
    for flag, values, known in (
        ("stage", stages, ("base", *run.config.stages)),
        ("decoder", decoders, DECODERS_OF[rank]),
        ("split", [split], SPLITS),
    ):
        for value in values or ([""] if flag == "decoder" else []):
            if value not in known:
                raise InputError(f"--{flag}: found {value!r}, expected {', '.join(known)}")
    if "base" in stages and run.config.item_vectors:
        raise InputError(
            "--stage: found base of a run whose prompts hold item vectors, which the base cannot "
            "read: evaluate that of a run without config.item_vectors"
        )
    return run


def _evaluate(
    run: Run,
    evaluator: Evaluator,
    stage: str,
    step: int,
    decoders: Sequence[str],
    limit: int,
) -> list[dict[str, Any]]:
    lora = adapter(run, stage, step, evaluator.model.lora)
    n = len(evaluator.rows)
    with tqdm(total=n, desc=f"{stage} step {step}", unit="window", mininterval=1) as bar:
        predictions, seconds = evaluator.run(lora, decoders, bar.update)
    summaries = []
    for decoder in decoders:
        summary = results.summarize(
            decoder, predictions[decoder], evaluator.rank, evaluator.exposure
        )
        summary |= results.header(
            evaluator.dataset,
            run.config.dataset,
            evaluator.split,
            stage=stage,
            step=step,
            decoder=decoder,
            limit=limit,
            seed=run.config.seed,
            seconds=seconds[decoder],
        )
        summary |= {
            **({"beams": evaluator.beams} if decoder == "beam" else {}),
            **({"max_new_tokens": evaluator.new_tokens} if decoder == "greedy" else {}),
            "truncated_prompts": evaluator.encoder.truncated,
            "history": run.config.history,
            "model": run.config.model,
            "model_fingerprint": run.fingerprints["model"],
            "dtype": run.config.dtype,
            "base_dtype": run.config.base_dtype,
        }
        path = results.write_result(run.path / "eval", summary, predictions[decoder])
        print(results.line(summary, path), flush=True)
        summaries.append(summary)
    return summaries


def _done_before(
    run: Run, evaluator: Evaluator, stage: str, step: int, decoders: Sequence[str]
) -> bool:
    found = [results.find(run.path / "eval", stage, step, d, evaluator.split) for d in decoders]
    return all(summary and summary["n"] == len(evaluator.rows) for summary in found)


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    common = (args.workdir, args.stage, args.split, args.decoder, args.limit or 0)
    if args.follow and args.step is not None:
        raise InputError("--step: found it beside --follow, expected one of the two: drop one")
    if args.follow and args.rank != "candidates":
        raise InputError(
            f"--rank: found {args.rank} beside --follow, expected candidates: anything else is "
            "ranked once a stage has ended"
        )
    try:
        if args.follow:
            follow(*common, batch_size=args.batch_size or 0)
        else:
            evaluate(
                *common,
                step=args.step,
                batch_size=args.batch_size or 0,
                rank=args.rank,
                beams=args.beams,
            )
    except KeyboardInterrupt:
        print(f"stopped; the finished evaluations are in {args.workdir}/eval")
        sys.exit(130)
    print(f"next: python -m sdpo_jax.report --workdir={args.workdir}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_list("stage", [], "base, sft, sdpo; default: the last finished, --follow: all")
    flags.DEFINE_enum("split", "test", SPLITS, "windows to evaluate on")
    flags.DEFINE_list("decoder", ["greedy"], "one or several, with commas; see above")
    flags.DEFINE_enum("rank", "candidates", list(DECODERS_OF), "what is ranked; see above")
    flags.DEFINE_integer("beams", 20, "width of --decoder=beam", lower_bound=1)
    flags.DEFINE_integer("limit", None, "evenly spaced windows; default: all", lower_bound=1)
    flags.DEFINE_integer("step", None, "checkpoint of the stage; default: the best", lower_bound=0)
    flags.DEFINE_integer("batch_size", None, "default: 8 on a CPU, 32 elsewhere", lower_bound=1)
    flags.DEFINE_bool("follow", False, "evaluate the checkpoints of a run in progress as they come")
    run_command(main)
