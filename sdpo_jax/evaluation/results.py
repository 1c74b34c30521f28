"""The files of `workdir/eval`: a summary as JSON, its predictions beside it as JSONL.

| evaluated | candidates | another rank: `catalogue`, `disliked` |
|---|---|---|
| a stage of the run | `<stage>-<step>-<decoder>` | `<stage>-<step>-<decoder>-<rank>` |
| a baseline, by score | `<system>-candidates` | `<system>-<rank>` |
| ChatRec | `chatrec-greedy` | |

Such a file has the split evaluated last. An older evaluation of another split is renamed to end in
`-<split>`, so each split has one file and none is lost.
"""

import collections
import functools
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.data.prepared import SPLITS, Dataset
from sdpo_jax.evaluation import metrics
from sdpo_jax.evaluation.predictions import LISTED, Prediction
from sdpo_jax.evaluation.systems import SYSTEMS
from sdpo_jax.runs.config import STAGES
from sdpo_jax.system import files
from sdpo_jax.system.errors import InputError

# What is ranked: a window's candidates; all items but those of its history; or the target against
# an item that the same user rated low, where HR@1 is the AUC of liked against disliked.
RANKS = ("candidates", "catalogue", "disliked")
DECODERS = ("greedy", "trie", "score", "beam")
RANKING_DECODERS = ("score", "beam")  # their predictions have a rank
Metric = Callable[[int | None], float]


def _metrics(hits: Sequence[int], gains: Sequence[int]) -> dict[str, Metric]:
    """Key of the summary -> metric of a rank, a value from 0 to 1."""
    return {
        **{f"hit_ratio_at_{k}": functools.partial(metrics.hit_at, k) for k in hits},
        **{f"ndcg_at_{k}": functools.partial(metrics.ndcg_at, k) for k in gains},
        "mrr": metrics.reciprocal_rank,
    }


# HR@1 is that of the hits, for every decoder; among the catalogue it is one of the rank too.
METRICS = {
    "candidates": _metrics(hits=(5, 10), gains=(5, 10)),
    "catalogue": _metrics(hits=(1, 5, 10, 20), gains=(5, 10, 20)),
}
INTERVAL = files.Kind(
    "two numbers", lambda value: files.list_of(files.NUMBER).right(value) and len(value) == 2
)
_SHARES = (
    "valid_ratio",
    "coverage_at_10",
    "gini_at_10",
    *dict.fromkeys(name for of_rank in METRICS.values() for name in of_rank),
)
# Stage, step, decoder, rank and split are also parts of file names.
SUMMARY = {
    **{f"{name}?": files.SHARE for name in _SHARES},
    **{f"{name}_ci95?": INTERVAL for name in _SHARES},
    "mean_popularity_at_10?": files.NUMBER,
    "stage": files.one_of("base", *STAGES, *SYSTEMS),
    "step": files.COUNT,
    "decoder": files.one_of(*DECODERS),
    "rank": files.one_of(*RANKS),
    "split": files.one_of(*SPLITS),
    "n": files.POSITIVE,
    "hit_ratio_at_1": files.SHARE,
    "seconds?": files.NUMBER,
    "users?": files.POSITIVE,
    "candidates?": files.POSITIVE,
    "items?": files.POSITIVE,
}
PREDICTION = {
    "row": files.COUNT,
    "hit": files.Kind("true or false", lambda value: type(value) is bool),
    "user?": files.Kind("a number or a text", lambda value: type(value) in (int, str)),
}
AGAIN = "remove it and evaluate again"
Exposure = tuple[int, Mapping[Hashable, int]]  # the number of all items, item -> training count


def exposure_of(dataset: Dataset) -> Exposure:
    """The number of items, and how often each is a target in training."""
    targets: list[Hashable] = [window.target for window in dataset.splits["train"]]
    return len(dataset.titles), collections.Counter(targets)


def header(
    data: Dataset,
    folder: str | Path,
    split: str,
    *,
    stage: str,
    step: int,
    decoder: str,
    limit: int,
    seed: int,
    seconds: float,
) -> dict[str, Any]:
    """The keys that every result has: its windows, its system, its data in `folder`."""
    return {
        "protocol": data.meta.get("protocol"),
        "split": split,
        "limit": limit,
        "stage": stage,
        "step": step,
        "decoder": decoder,
        "candidates": len(data.splits[split][0].candidates),
        "seconds": round(seconds, 2),
        "seed": seed,
        "dataset": str(folder),
        "dataset_fingerprint": data.meta["fingerprint"],
    }


def summarize(
    decoder: str,
    predictions: Sequence[Prediction],
    rank: str = "candidates",
    exposure: Exposure | None = None,
) -> dict[str, Any]:
    """Metrics over all predictions; those of ranks only for decoders that rank.

    A prediction over the catalogue has `rank` (None: not in the ranked list) and `top`, the ids of
    the first 10 items. `exposure` gives their coverage, Gini index and mean popularity.
    """
    n, users = len(predictions), users_of(predictions)
    summary = {"rank": rank, "n": n, "users": len(set(users))}
    for key, name in (("hit", "hit_ratio_at_1"), ("valid", "valid_ratio")):
        summary |= _share(name, [p[key] for p in predictions], users)
    if decoder in RANKING_DECODERS and rank in METRICS:
        summary |= _of_ranks(METRICS[rank], predictions, users)
    if rank == "catalogue" and exposure is not None:
        summary |= _of_items(predictions, *exposure)
    return summary


def _share(name: str, values: Sequence[float], users: Sequence[Hashable]) -> dict[str, Any]:
    """A proportion and its interval."""
    n, successes = len(values), sum(values)
    interval = metrics.wilson(successes, n, metrics.design_effect(values, users))
    return {name: successes / n, f"{name}_ci95": list(interval)}


def _of_ranks(
    wanted: Mapping[str, Metric], predictions: Sequence[Prediction], users: Sequence[Hashable]
) -> dict[str, Any]:
    """Each metric and its interval; a proportion has Wilson's."""
    found: dict[str, Any] = {}
    for name, metric in wanted.items():
        values = [metric(p["rank"]) for p in predictions]
        if name.startswith("hit_ratio"):
            found |= _share(name, values, users)
        else:
            interval = metrics.interval(values, users)
            found |= {name: metrics.mean(values), f"{name}_ci95": list(interval)}
    return found


def _of_items(
    predictions: Sequence[Prediction], items: int, counts: Mapping[Hashable, int]
) -> dict[str, Any]:
    lists = [p["top"][:LISTED] for p in predictions]
    return {
        "items": items,
        f"coverage_at_{LISTED}": metrics.coverage(lists, items),
        f"gini_at_{LISTED}": metrics.gini(lists, items),
        f"mean_popularity_at_{LISTED}": metrics.mean_popularity(lists, counts),
    }


def users_of(predictions: Iterable[Prediction]) -> list[Any]:
    """The user of each window; one without a user counts as a user."""
    return [prediction.get("user", (prediction["row"],)) for prediction in predictions]


def result_path(
    folder: Path, stage: str, step: int, decoder: str, rank: str = "candidates"
) -> Path:
    if stage in SYSTEMS:
        return folder / f"{stage}-{rank if decoder == 'score' else decoder}.json"
    suffix = "" if rank == "candidates" else f"-{rank}"
    return folder / f"{stage}-{step}-{decoder}{suffix}.json"


def find(
    folder: Path, stage: str, step: int, decoder: str, split: str, rank: str = "candidates"
) -> dict[str, Any] | None:
    """The summary of an earlier evaluation, under either of its two names."""
    path = result_path(folder, stage, step, decoder, rank)
    for candidate in (path, path.with_stem(f"{path.stem}-{split}")):
        if os.path.lexists(candidate) and (summary := _read(candidate))["split"] == split:
            return summary
    return None


def write_result(folder: Path, summary: dict[str, Any], predictions: Iterable[Prediction]) -> Path:
    """Writes both files atomically, the summary last; returns its path.

    Raises InputError if they cannot be written.
    """
    path = result_path(folder, *(summary[key] for key in ("stage", "step", "decoder", "rank")))
    try:
        _make_room(path, summary["split"])
        encode = json.JSONEncoder(ensure_ascii=False).encode
        with (
            files.whole_file(path.with_suffix(".jsonl")) as partial,
            open(partial, "w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(encode(prediction) + "\n" for prediction in predictions)
        files.write_json(path, summary)
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
    if summary["rank"] == "catalogue":
        how = f"{summary['decoder']} over the catalogue"
        measured = [_with_interval(summary, "HR@10", "hit_ratio_at_10")]
        further = (("NDCG@10", "ndcg_at_10"), ("MRR", "mrr"), ("coverage@10", "coverage_at_10"))
    elif summary["rank"] == "disliked":
        how, further = f"{summary['decoder']} of liked against disliked", ()
        measured = [_with_interval(summary, "AUC", "hit_ratio_at_1")]
    else:
        how = summary["decoder"]
        measured = [
            _with_interval(summary, "HR@1", "hit_ratio_at_1"),
            f"valid {summary['valid_ratio']:.4f}",
        ]
        further = (("HR@5", "hit_ratio_at_5"), ("NDCG@10", "ndcg_at_10"), ("MRR", "mrr"))
    measured += [f"{name} {summary[key]:.4f}" for name, key in further if key in summary]
    return (
        f"{summary['stage']} step {summary['step']}, {how}, {summary['split']}: "
        f"{', '.join(measured)}, n {summary['n']}, {summary['seconds']:.1f} s, {path}"
    )


def _with_interval(summary: dict[str, Any], name: str, key: str) -> str:
    low, high = summary[f"{key}_ci95"]
    return f"{name} {summary[key]:.4f} [{low:.4f}, {high:.4f}]"


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All summaries, each with its "path" and its "time" of writing, the oldest first."""
    paths = sorted(folder.glob("[!.]*.json"))
    found = [_read(path) | {"path": path, "time": path.stat().st_mtime} for path in paths]
    return sorted(found, key=lambda summary: summary["time"])


def read_predictions(summary: dict[str, Any]) -> tuple[Prediction, ...]:
    """The predictions beside a summary of `read_results`, in order of rows.

    Each has its row, user, hit, validity and rank. They stay in memory, as a page compares most of
    them with several others.
    """
    path = summary["path"].with_suffix(".jsonl")
    return _predictions(path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=512)
def _predictions(path: Path, written: int) -> tuple[Prediction, ...]:
    """`written`: when, as a file that was written later has others."""
    found = files.read_json_lines(
        path, PREDICTION, "expected the predictions of an evaluation", AGAIN
    )
    compared = ("row", "user", "hit", "valid", "rank")
    short = ({key: one[key] for key in compared if key in one} for one in found)
    return tuple(sorted(short, key=lambda prediction: prediction["row"]))


def _read(path: Path) -> dict[str, Any]:
    summary = files.read_json(path, f"expected a file of sdpo_jax.evaluate: {AGAIN}")
    files.check_keys(path, summary, SUMMARY, AGAIN)
    return summary
