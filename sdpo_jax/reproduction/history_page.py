"""The page's section about histories: a verdict per claim, then the figures behind it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.evaluation.metrics import Difference
from sdpo_jax.evaluation.results import read_results
from sdpo_jax.evaluation.systems import TRADITIONAL
from sdpo_jax.reports import figures
from sdpo_jax.reports.document import Heading, Notes, Part, Picture, Table, Text
from sdpo_jax.reports.tables import interval_and_p, paired
from sdpo_jax.reproduction import histories
from sdpo_jax.reproduction.cells import BETA, DATASETS, Place, Row, Study
from sdpo_jax.reproduction.figures_of import (
    Summary,
    curves,
    interval,
    missing,
    pictures,
    protocols,
    ratio,
)
from sdpo_jax.reproduction.histories import MANY, K

HEADER = (
    "",
    "HR@1 of 20 [95%]",
    "NDCG@10 of 20",
    "HR@10, catalogue [95%]",
    "NDCG@10, catalogue",
    "coverage@10",
    "Gini@10",
    "popularity@10",
    "n",
    "step",
    "minus SFT, HR@1",
    "p",
    "minus SFT, catalogue HR@10",
    "p",
)
LEGEND = (
    "Every title of a history is a target of SFT. HR@1 of 20: the target has the highest score "
    "among the window's candidates, which are drawn independently of it. Catalogue: the target is "
    "among the first 10 of all items, by a beam of 20 or, for networks, by score. Coverage, Gini "
    "index and mean popularity are of those first 10.",
    "A claim is shown where the whole interval of the difference lies on its side of 0, refuted "
    "where it lies on the other, and otherwise not shown. Differences are paired, with Bonett & "
    "Price's interval and the design effect of users.",
)
CATALOGUE = 10  # K of the hit ratio over the catalogue


class Pair(NamedTuple):
    """The evaluations of a row: among the candidates, and over the catalogue."""

    candidates: Summary | None
    catalogue: Summary | None


def claims(place: Place) -> list[tuple[str, Row, Row]]:
    """(claim, the row that it says is ahead, the other one)."""
    rows = {row.label: row for row in histories.rows(place)}
    sft, dpo, sdpo, many = (
        rows[label] for label in ("SFT", "DPO", f"S-DPO, K = {K}", f"S-DPO, K = {MANY}")
    )
    draws = {row.label: row for row in histories.over_draws(place)}
    balanced = rows[f"S-DPO, beta = {BETA:g}"]
    return [
        ("DPO is ahead of SFT", dpo, sft),
        ("S-DPO is ahead of SFT", sdpo, sft),
        ("S-DPO is ahead of DPO", sdpo, dpo),
        ("S-DPO is ahead of DPO on as many pairs", sdpo, rows[f"DPO, {K} pairs"]),
        (f"K = {MANY} is ahead of K = {K}", many, sdpo),
        *(
            (f"beta = {BETA:g} is ahead of beta = {row.at:g}", balanced, row)
            for row in histories.over_betas(place)
            if row.at != BETA
        ),
        *(
            (f"{name} negatives are ahead of uniform ones", draws[f"S-DPO, {name} negatives"], sdpo)
            for name in histories.DRAWN
        ),
        (f"S-DPO, K = {MANY}, is ahead of SASRec", many, rows["SASRec"]),
    ]


def verdict(d: Difference | None) -> str:
    if d is None:
        return "no figures"
    if d.low > 0:
        return "shown"
    return "refuted" if d.high < 0 else "not shown"


def find(place: Place, row: Row) -> Pair:
    """The latest evaluations of a row on the study's windows."""
    assert row.cell is not None
    found = {
        summary["rank"]: summary
        for summary in read_results(row.cell.folder / "eval")
        if (summary["stage"], summary["split"]) == (row.stage, place.split)
    }
    return Pair(found.get("candidates"), found.get("catalogue"))


def section(study: Study, datasets: Sequence[str], failed: Mapping[Path, str]) -> list[Part]:
    places = [Place(study, name) for name in datasets]
    about = f"configs/{histories.CONFIG}.py{study.scale.variant}, not the paper's recipe."
    page: list[Part] = [Text(about), Notes(LEGEND), *_claims(places)]
    for place in places:
        page += [Heading(DATASETS[place.dataset], 3), *_dataset(place, failed)]
    return page


def _claims(places: Sequence[Place]) -> list[Part]:
    """One line per claim, one column per data set and end."""
    header = ["claim"]
    columns: list[list[str]] = []
    for place in places:
        listed = claims(place)
        ends = ((0, 1, "HR@1 of 20"), (1, CATALOGUE, f"catalogue HR@{CATALOGUE}"))
        for end, at, name in ends:
            header.append(f"{DATASETS[place.dataset]}, {name}")
            found = [
                difference(find(place, first)[end], find(place, second)[end], at)
                for _, first, second in listed
            ]
            columns.append([_told(d) for d in found])
    names = [claim for claim, _, _ in claims(places[0])] if places else []
    lines = [[name, *cells] for name, *cells in zip(names, *columns, strict=True)]
    return [Heading("Claims", 3), Table([header, *lines])]


def difference(a: Summary | None, b: Summary | None, at: int) -> Difference | None:
    return paired(a, b, at) if a and b and a["path"] != b["path"] else None


def _told(d: Difference | None) -> str:
    if d is None:
        return verdict(d)
    value, p = interval_and_p(d)
    return f"{verdict(d)}: {value}, p {p}"


def _dataset(place: Place, failed: Mapping[Path, str]) -> list[Part]:
    groups = [
        histories.systems(place),
        histories.over_negatives(place),
        histories.over_betas(place),
        histories.over_draws(place),
    ]
    tuned = [row for row in groups[0] if row.stage == "sdpo"]
    page: list[Part] = [part for rows in groups for part in _table(place, rows)]
    every = [row for rows in groups for row in rows]
    lacking = [row for row in every if not all(find(place, row))]
    said = [s for row in every for s in find(place, row) if s]
    page.append(Notes([*missing(lacking, failed), *protocols(said)]))
    return page + pictures(
        lambda: _over(place, groups[1], "K negatives"),
        lambda: _over(place, groups[2], "beta"),
        lambda: curves(place, tuned, "validation/loss", "validation loss"),
        lambda: curves(place, tuned, "rewards/chosen", "reward of the preferred title"),
        lambda: curves(place, tuned, "rewards/rejected", "mean reward of the rejected titles"),
        lambda: curves(place, tuned, "logps/chosen", "log-prob of the preferred title"),
    )


def _table(place: Place, rows: Sequence[Row]) -> list[Part]:
    """One row per system that has been evaluated at all."""
    sft = find(place, next(row for row in histories.systems(place) if row.system == "sft"))
    lines = [_line(row, find(place, row), sft) for row in rows if any(find(place, row))]
    return [Table([HEADER, *lines])] if lines else []


def _line(row: Row, found: Pair, sft: Pair) -> list[str]:
    candidates, catalogue = found.candidates or {}, found.catalogue or {}
    sizes = [str(s["n"]) for s in found if s]
    compared: list[str] = []
    for end, at in ((0, 1), (1, CATALOGUE)):
        d = difference(found[end], sft[end], at)
        compared += ["–", "–"] if d is None else interval_and_p(d)
    return [
        row.label,
        ratio(found.candidates, "hit_ratio_at_1"),
        _number(candidates.get("ndcg_at_10")),
        ratio(found.catalogue, f"hit_ratio_at_{CATALOGUE}"),
        _number(catalogue.get("ndcg_at_10")),
        _number(catalogue.get("coverage_at_10")),
        _number(catalogue.get("gini_at_10")),
        _number(catalogue.get("mean_popularity_at_10"), 1),
        "/".join(dict.fromkeys(sizes)),
        "–" if row.system in TRADITIONAL else str((found.candidates or catalogue).get("step", "–")),
        *compared,
    ]


def _number(value: float | None, places: int = 3) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def _over(place: Place, rows: Sequence[Row], axis: str) -> Picture | None:
    found = [(row, s) for row in rows if (s := find(place, row).candidates)]
    if len(found) < 2:
        return None
    values = [interval(s, "hit_ratio_at_1") for _, s in found]
    at = [row.at for row, _ in found]
    svg = figures.over(f"{place.dataset} history {axis}", at, values, axis, "HR@1 of 20")
    return Picture(svg, f"{DATASETS[place.dataset]}: HR@1 among 20 candidates over {axis}")
