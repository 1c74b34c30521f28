"""The files of `workdir/eval`: a summary as JSON, its predictions beside it as JSONL.

`<stage>-<step>-<decoder>.json`, or `<system>-<decoder>.json` of what is no stage of the run, holds
the split asked for last. An evaluation of another split that lay there is kept with `-<split>` at
the end of its name, so none is lost and each is one file.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sdpo_jax import files
from sdpo_jax.config import STAGES
from sdpo_jax.data.prepared import SPLITS
from sdpo_jax.errors import InputError
from sdpo_jax.evaluation import metrics
from sdpo_jax.evaluation.decode import DECODERS
from sdpo_jax.files import COUNT, NUMBER, POSITIVE, SHARE, check_keys, one_of
from sdpo_jax.workdir import write_json

# Systems that are no stage of a run: they stand in `stage`.
SYSTEMS = ("random", "popularity", "gru4rec", "caser", "sasrec", "morec", "chatrec")
# How they choose: among a window's candidates, or among all items. Both rank, as `score` does.
RANKINGS = ("candidates", "catalogue")
INTERVAL = ("two numbers", lambda value: files.list_of(NUMBER)[1](value) and len(value) == 2)
# Stage, step, decoder and split are also parts of names of files.
SUMMARY = {
    "stage": one_of("base", *STAGES, *SYSTEMS), "step": COUNT,
    "decoder": one_of(*DECODERS, *RANKINGS),
    "split": one_of(*SPLITS), "n": POSITIVE, "hit_ratio_at_1": SHARE, "seconds?": NUMBER,
    "hit_ratio_at_1_ci95?": INTERVAL, "valid_ratio_ci95?": INTERVAL, "users?": POSITIVE,
    "candidates?": POSITIVE,
    **dict.fromkeys(
        ("valid_ratio?", "hit_ratio_at_5?", "hit_ratio_at_10?", "ndcg_at_5?", "ndcg_at_10?",
         "mrr?"), SHARE
    ),
}  # fmt: skip
PREDICTION = {
    "row": COUNT, "hit": ("true or false", lambda value: type(value) is bool),
    "user?": ("a number or a text", lambda value: type(value) in (int, str)),
}  # fmt: skip
AGAIN = "remove it and evaluate again"
Prediction = dict[str, Any]


def summarise(decoder: str, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Metrics over all predictions; those of ranks only for decoders that rank."""
    n, users = len(predictions), users_of(predictions)
    summary = {"n": n, "users": len(set(users))}
    for key, name in (("hit", "hit_ratio_at_1"), ("valid", "valid_ratio")):
        values = [p[key] for p in predictions]
        interval = metrics.wilson(sum(values), n, metrics.design_effect(values, users))
        summary |= {name: sum(values) / n, f"{name}_ci95": list(interval)}
    if decoder in ("score", *RANKINGS):
        ranks = [p["rank"] for p in predictions]
        summary |= {
            "hit_ratio_at_5": metrics.mean([metrics.hit_at(5, rank) for rank in ranks]),
            "hit_ratio_at_10": metrics.mean([metrics.hit_at(10, rank) for rank in ranks]),
            "ndcg_at_5": metrics.mean([metrics.ndcg_at(5, rank) for rank in ranks]),
            "ndcg_at_10": metrics.mean([metrics.ndcg_at(10, rank) for rank in ranks]),
            "mrr": metrics.mean([metrics.reciprocal_rank(rank) for rank in ranks]),
        }
    return summary


def users_of(predictions: Iterable[Prediction]) -> list[Any]:
    """Whose window each is; each that does not tell is taken as of a user of its own."""
    return [prediction.get("user", (prediction["row"],)) for prediction in predictions]


def result_path(folder: Path, stage: str, step: int, decoder: str) -> Path:
    name = stage if stage in SYSTEMS else f"{stage}-{step}"
    return folder / f"{name}-{decoder}.json"


def find(folder: Path, stage: str, step: int, decoder: str, split: str) -> dict[str, Any] | None:
    """The summary of an earlier evaluation, whichever of the two names it has."""
    path = result_path(folder, stage, step, decoder)
    for candidate in (path, path.with_stem(f"{path.stem}-{split}")):
        if os.path.lexists(candidate) and (summary := _read(candidate))["split"] == split:
            return summary
    return None


def write_result(folder: Path, summary: dict[str, Any], predictions: Iterable[Prediction]) -> Path:
    """Writes both files, each whole or not at all, the summary last; returns its path.

    Raises InputError where the disk refuses.
    """
    path = result_path(folder, summary["stage"], summary["step"], summary["decoder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_room(path, summary["split"])
        partial = folder / f".{path.name}.{os.getpid()}.partial"
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with open(partial, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(encode(prediction) + "\n" for prediction in predictions)
        os.replace(partial, path.with_suffix(".jsonl"))
        write_json(path, summary)
    except OSError as error:
        raise InputError(
            f"{path}: found {error.strerror}, expected to write it: free space or mend permissions"
        ) from error
    return path


def _make_room(path: Path, split: str) -> None:
    for file in (path, path.with_suffix(".jsonl")):
        file.with_stem(f"{path.stem}-{split}").unlink(missing_ok=True)
    if os.path.lexists(path) and (other := _read(path)["split"]) != split:
        for file in filter(Path.exists, (path.with_suffix(".jsonl"), path)):
            os.replace(file, file.with_stem(f"{path.stem}-{other}"))


def line(summary: dict[str, Any], path: Path) -> str:
    """One line of a summary, for a terminal."""
    low, high = summary["hit_ratio_at_1_ci95"]
    ranking = ""
    if "mrr" in summary:
        ranking = (
            f", HR@5 {summary['hit_ratio_at_5']:.4f}, NDCG@10 {summary['ndcg_at_10']:.4f}, "
            f"MRR {summary['mrr']:.4f}"
        )
    return (
        f"{summary['stage']} step {summary['step']}, {summary['decoder']}, {summary['split']}: "
        f"HR@1 {summary['hit_ratio_at_1']:.4f} [{low:.4f}, {high:.4f}], valid "
        f"{summary['valid_ratio']:.4f}{ranking}, n {summary['n']}, {summary['seconds']:.1f} s, "
        f"{path}"
    )


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All summaries, each with its "path" and its "time" of writing, the oldest first."""
    paths = sorted(folder.glob("[!.]*.json"))
    found = [_read(path) | {"path": path, "time": path.stat().st_mtime} for path in paths]
    return sorted(found, key=lambda summary: summary["time"])


def read_predictions(summary: dict[str, Any]) -> list[Prediction]:
    """The predictions beside a summary of `read_results`, in order of rows."""
    path = summary["path"].with_suffix(".jsonl")
    lines = files.read_text(path, f"expected the predictions of an evaluation: {AGAIN}")
    found = []
    for number, line in enumerate(lines.removesuffix("\n").split("\n"), 1):
        try:
            prediction = files.parse_json(line)
        except ValueError as error:
            raise InputError(
                f"{path}:{number}: found no valid JSON ({error}), expected a prediction: {AGAIN}"
            ) from error
        check_keys(f"{path}:{number}", prediction, PREDICTION, AGAIN)
        found.append(prediction)
    return sorted(found, key=lambda prediction: prediction["row"])


def _read(path: Path) -> dict[str, Any]:
    summary = files.read_json(path, f"expected a file of sdpo_jax.evaluate: {AGAIN}")
    check_keys(path, summary, SUMMARY, AGAIN)
    return summary
