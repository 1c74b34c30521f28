"""Tables of a run's evaluations and paired differences, and the report as Markdown."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sdpo_jax.evaluation import metrics, results
from sdpo_jax.evaluation.systems import NAMES, SYSTEMS
from sdpo_jax.reports.markdown import plain
from sdpo_jax.runs.curves import read_metrics
from sdpo_jax.runs.workdir import Run, stage_result
from sdpo_jax.system.errors import InputError

# (column, key of the summary): of the score decoder on candidates, then of the catalogue.
RANKING = (("HR@5", "hit_ratio_at_5"), ("NDCG@10", "ndcg_at_10"), ("MRR", "mrr"))
HIT_RATIOS = tuple((f"HR@{k} [95%]", f"hit_ratio_at_{k}") for k in (1, 5, 10, 20))
FURTHER = (
    ("NDCG@10", "ndcg_at_10"),
    ("MRR", "mrr"),
    ("coverage@10", "coverage_at_10"),
    ("Gini@10", "gini_at_10"),
)


def names(run: Run) -> dict[str, str]:
    """Stage or other system -> its name in tables."""
    return NAMES | {"sdpo": run.config.method}


@dataclasses.dataclass(frozen=True)
class Row:
    """One stage at one step, or another system: its summaries by decoder."""

    stage: str
    step: int
    by_decoder: dict[str, dict[str, Any]]


Rows = Mapping[str, Sequence[Row]]  # by rank


def choose_rows(run: Run, split: str | None = None) -> tuple[str, Rows]:
    """The split and, per rank, one row per stage: at its best step if evaluated, else the last.

    `split` defaults to the one evaluated last. Raises InputError when nothing is evaluated.
    """
    found = results.read_results(run.path / "eval")
    if not found:
        raise InputError(
            f"{run.path}/eval: found no evaluation, expected one: run python -m "
            f"sdpo_jax.evaluate --workdir={run.path} --stage=base,sft,sdpo --decoder=greedy,score"
        )
    chosen = split or found[-1]["split"]
    if chosen not in (known := sorted({summary["split"] for summary in found})):
        raise InputError(
            f"--split: found {chosen}, expected one that was evaluated: {', '.join(known)}"
        )
    return chosen, {
        rank: _rows(run, [s for s in found if (s["split"], s["rank"]) == (chosen, rank)])
        for rank in results.RANKS
    }


def _rows(run: Run, found: Sequence[dict[str, Any]]) -> list[Row]:
    rows = []
    for stage in names(run):
        steps = [summary["step"] for summary in found if summary["stage"] == stage]
        if steps:
            best = (stage_result(run.path, stage) or {}).get("best_step", -1)
            latest = steps[-1] if stage in SYSTEMS else max(steps)
            step = best if best in steps else latest
            decoders = {s["decoder"]: s for s in found if (s["stage"], s["step"]) == (stage, step)}
            ordered = {d: decoders[d] for d in results.DECODERS if d in decoders}
            rows.append(Row(stage, step, ordered))
    return rows


def reward_accuracy(run: Run, step: int) -> tuple[float, int] | None:
    """Share of validation windows whose preferred candidate has the highest reward, and their n.

    Taken at `step`, else at the last validation; n is 0 where unknown. None without validation
    and at step 0: the policy is the reference, so all rewards are 0.
    """
    if step == 0:
        return None
    key = "validation/rewards/accuracies"
    lines = [m for m in read_metrics(run.path / "metrics") if m["stage"] == "sdpo" and key in m]
    at_step = [line for line in lines if line["step"] == step] or lines
    if not at_step:
        return None
    return at_step[-1][key], int(at_step[-1].get("validation/windows", 0))


def table(run: Run, rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of the rankings of candidates, the chance level last."""
    decoders = [d for d in results.DECODERS if any(d in row.by_decoder for row in rows)]
    header = ["", "step"]
    for decoder in decoders:
        header.append(f"HR@1 {decoder} [95%]")
        header += ["valid"] if decoder == "greedy" else []
        header += [name for name, _ in RANKING] if decoder == "score" else []
    header += ["reward accuracy [95%]", "n", "training s", "evaluation s"]
    return [header, *(_cells(run, row, decoders) for row in rows), _chance(run, rows, decoders)]


def _cells(run: Run, row: Row, decoders: Sequence[str]) -> list[str]:
    cells = [names(run)[row.stage], str(row.step)]
    for decoder in decoders:
        summary = row.by_decoder.get(decoder, {})
        cells.append(_ratio(summary.get("hit_ratio_at_1"), summary.get("hit_ratio_at_1_ci95")))
        cells += [_number(summary.get("valid_ratio"))] if decoder == "greedy" else []
        cells += [_number(summary.get(key)) for _, key in RANKING] if decoder == "score" else []
    accuracy = reward_accuracy(run, row.step) if row.stage == "sdpo" else None
    if accuracy is None:
        cells.append("–")
    else:
        value, n = accuracy
        cells.append(_ratio(value, metrics.wilson(value * n, n) if n else None))
    cells.append("/".join(sorted({str(s["n"]) for s in row.by_decoder.values()})))
    result = stage_result(run.path, row.stage)
    cells.append(f"{result['seconds']:.0f}" if result else "–")
    seconds = (row.by_decoder[d].get("seconds") for d in decoders if d in row.by_decoder)
    return [*cells, "/".join("–" if s is None else f"{s:.0f}" for s in seconds)]


def _chance(run: Run, rows: Sequence[Row], decoders: Sequence[str]) -> list[str]:
    C = next(iter(rows[0].by_decoder.values())).get("candidates", 20)
    cells = ["chance", ""]
    for decoder in decoders:
        cells.append(_number(1 / C))
        cells += ["–"] if decoder == "greedy" else []
        if decoder == "score":
            cells += [
                _number(metrics.chance(results.METRICS["candidates"][key], C)) for _, key in RANKING
            ]
    return [*cells, _number(1 / (1 + run.config.num_negatives)), "", "", ""]


def catalogue_table(run: Run, rows: Sequence[Row]) -> list[list[str]]:
    """Header and rows of the rankings of the whole catalogue: a row per system and decoder."""
    columns = [name for name, _ in (*HIT_RATIOS, *FURTHER)]
    cells = [["", "step", "decoder", *columns, "popularity@10", "n"]]
    for row in rows:
        for decoder, s in row.by_decoder.items():
            popularity = s.get("mean_popularity_at_10")
            cells.append(
                [
                    names(run)[row.stage],
                    str(row.step),
                    decoder,
                    *(_ratio(s.get(key), s.get(f"{key}_ci95")) for _, key in HIT_RATIOS),
                    *(_number(s.get(key)) for _, key in FURTHER),
                    "–" if popularity is None else f"{popularity:.1f}",
                    str(s["n"]),
                ]
            )
    return cells


def differences(run: Run, rows: Sequence[Row], metric: str = "HR@1") -> list[list[str]]:
    """S-DPO against all others, SFT against base: paired `metric` on the shared windows."""
    named = names(run)
    cells = [
        ["", "decoder", f"difference of {metric} [95%]", "p", "only first", "only second", "n"]
    ]
    by_stage = {row.stage: row.by_decoder for row in rows}
    others = [("sdpo", system) for system in SYSTEMS]
    for first, second in (("sdpo", "sft"), ("sdpo", "base"), ("sft", "base"), *others):
        if first not in by_stage or second not in by_stage:
            continue
        a, b = by_stage[first], by_stage[second]
        for decoder in (d for d in results.DECODERS if d in a and d in b):
            d = paired(a[decoder], b[decoder])
            if d is not None:
                pair = f"{named[first]} – {named[second]}"
                counts = [str(d.only_a), str(d.only_b), str(d.n)]
                cells.append([pair, decoder, *interval_and_p(d), *counts])
    return cells


def paired(a: dict[str, Any], b: dict[str, Any], at: int = 1) -> metrics.Difference | None:
    """The difference of HR@`at` on the rows of both evaluations; None if they share none."""
    first, second = ({p["row"]: p for p in results.read_predictions(s)} for s in (a, b))
    if not (shared := sorted(first.keys() & second.keys())):
        return None
    hits_a, hits_b = ([_hit(by_row[row], at) for row in shared] for by_row in (first, second))
    return metrics.paired_difference(hits_a, hits_b, results.users_of(first[row] for row in shared))


def _hit(prediction: Mapping[str, Any], at: int) -> bool:
    """Greedy answers have no rank; over the catalogue it is None where the target is not found."""
    if at == 1:
        return prediction["hit"]
    return prediction["rank"] is not None and prediction["rank"] <= at


def interval_and_p(d: metrics.Difference) -> tuple[str, str]:
    """A difference with its interval, and its p."""
    p = "<0.001" if d.p < 0.001 else f"{d.p:.3f}"
    return f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]", p


def render(run: Run, split: str, rows: Rows, picture: str | None) -> str:
    """The whole report as Markdown."""
    first = next(row for ranked in rows.values() for row in ranked)
    summary = next(iter(first.by_decoder.values()))
    parts = [
        f"# {plain(run.path)}",
        f"Model {plain(run.config.model)}, data {plain(run.config.dataset)}, split {split}, seed "
        f"{run.config.seed}.",
        f"Protocol: {plain(summary.get('protocol'))}.",
        *(_candidates(run, rows["candidates"]) if rows["candidates"] else ()),
        *(_catalogue(run, rows["catalogue"]) if rows["catalogue"] else ()),
        *(_disliked(run, rows["disliked"]) if rows["disliked"] else ()),
    ]
    if picture:
        parts.append(f"![training curves]({picture})")
    return "\n\n".join(parts) + "\n"


def _candidates(run: Run, rows: Sequence[Row]) -> list[str]:
    parts = [
        "\n".join(markdown(table(run, rows))),
        "HR@1 greedy and valid are the paper's: the generation names exactly one candidate. "
        "HR@5, NDCG@10 and MRR rank the candidates by log-probability. Reward accuracy is on the "
        f"{plain(run.config.validation_split)} split. Intervals are Wilson's, with the design "
        "effect of users except for reward accuracy. Evaluation seconds are per decoder, in the "
        "order of the columns.",
    ]
    compared = differences(run, rows)
    if len(compared) > 1:
        parts += [
            "## Paired differences",
            "\n".join(markdown(compared)),
            "Interval: Bonett & Price, with the same design effect; p: exact two-sided "
            "randomization test over users (McNemar's where each has one window).",
        ]
    return parts


def _catalogue(run: Run, rows: Sequence[Row]) -> list[str]:
    sizes = {s["items"] for row in rows for s in row.by_decoder.values() if "items" in s}
    items = f"all {'/'.join(f'{n:,}' for n in sorted(sizes))} items" if sizes else "all items"
    return [
        "## Whole catalogue",
        "\n".join(markdown(catalogue_table(run, rows))),
        f"The target is ranked among {items} except those of the window's history. A target that "
        "beam search does not find is a miss. Of the first 10 items per window: coverage is the "
        "share of all items recommended at least once, Gini the inequality of how often each item "
        "is recommended (0: all equally often), popularity the mean number of training "
        "interactions. Intervals are Wilson's, with the design effect of users.",
    ]


def _disliked(run: Run, rows: Sequence[Row]) -> list[str]:
    cells = [["", "step", "decoder", "AUC [95%]", "n"]]
    for row in rows:
        for decoder, s in row.by_decoder.items():
            auc = _ratio(s["hit_ratio_at_1"], s.get("hit_ratio_at_1_ci95"))
            cells.append([names(run)[row.stage], str(row.step), decoder, auc, str(s["n"])])
    compared = differences(run, rows, "AUC")
    return [
        "## Liked against disliked",
        "\n".join(markdown(cells)),
        *(["\n".join(markdown(compared))] if len(compared) > 1 else ()),
        "AUC: the share of windows whose target has a higher score than an item that the same user "
        "rated low later on. 0.5 is chance. Intervals as above.",
    ]


def markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """A table with aligned columns, as it is read in a terminal too."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _ratio(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None or interval is None:
        return _number(value)
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
