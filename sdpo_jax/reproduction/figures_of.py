"""Evaluations and curves of a study's rows, as parts of a page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.evaluation import metrics
from sdpo_jax.reports import curves_plot, figures
from sdpo_jax.reports.document import Part, Picture, Text
from sdpo_jax.reproduction.cells import DATASETS, Place, Row
from sdpo_jax.runs.curves import read_metrics

Summary = dict[str, Any]


def interval(summary: Summary, key: str) -> figures.Interval:
    """A ratio of the summary with its interval."""
    value, n = summary[key], summary["n"]
    low, high = summary.get(f"{key}_ci95") or metrics.wilson(value * n, n)
    return value, low, high


def ratio(summary: Summary | None, key: str) -> str:
    if summary is None or key not in summary:
        return "–"
    value, low, high = interval(summary, key)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def missing(rows: Sequence[Row], failed: Mapping[Path, str]) -> list[str]:
    """Why these rows have no figures, one line per reason."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        why = row.missing if row.cell is None else failed.get(row.cell.folder, "not run yet")
        reasons.setdefault(why, {})[row.label] = None
    return [f"{'; '.join(labels)}: {why}" for why, labels in reasons.items()]


def protocols(summaries: Sequence[Summary]) -> list[str]:
    """The windows and the protocol of evaluations, each once."""
    lines = dict.fromkeys(
        f"Split {s['split']}, n = {s['n']}. Protocol: {s.get('protocol')}." for s in summaries
    )
    return list(lines)


def pictures(*draw: Callable[[], Picture | None]) -> list[Part]:
    """The pictures with data; one line of text without matplotlib."""
    try:
        return [picture for one in draw if (picture := one())]
    except ImportError:
        return [Text("No picture: matplotlib is not installed (pip install matplotlib).")]


def curves(place: Place, rows: Sequence[Row], key: str, caption: str) -> Picture | None:
    """Curves of preference tuning only: SFT has another loss and no rewards."""
    lines = [
        (row.label, curves_plot.series(read_metrics(row.cell.folder / "metrics"), "sdpo", key))
        for row in rows
        if row.cell and row.stage == "sdpo"
    ]
    lines = [(label, points) for label, points in lines if points[0]]
    if not lines:
        return None
    svg = figures.curves(f"{place.dataset} {key}", lines, "nats")
    return Picture(svg, f"{DATASETS[place.dataset]}: {caption}")
