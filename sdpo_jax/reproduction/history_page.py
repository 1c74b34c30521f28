"""The page's section about histories: a verdict per claim, then the figures behind it."""

import collections
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from sdpo_jax.evaluation import window_groups
from sdpo_jax.evaluation.metrics import Difference
from sdpo_jax.evaluation.results import read_predictions, read_results, summarize
from sdpo_jax.evaluation.systems import TRADITIONAL
from sdpo_jax.reports import figures
from sdpo_jax.reports.document import Heading, Notes, Part, Picture, Table, Text
from sdpo_jax.reports.tables import interval_and_p, paired
from sdpo_jax.reproduction import cells, histories
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
APART = (
    f"By group of windows: a target is cold if it has fewer than {window_groups.COLD} interactions "
    f"in training, a history short if it has fewer than {window_groups.SHORT} titles."
)
NOTHING = "no figures"
CATALOGUE = 10  # K of the hit ratio over the catalogue

_SDPO, _MANY = f"S-DPO, K = {K}", f"S-DPO, K = {MANY}"
# (claim, the row that it says is ahead, the other one)
CLAIMS = (
    ("DPO is ahead of SFT", "DPO", "SFT"),
    ("S-DPO is ahead of SFT", _SDPO, "SFT"),
    *(
        (f"S-DPO is ahead of SFT, seed {seed}", f"S-DPO, seed {seed}", f"SFT, seed {seed}")
        for seed in histories.SEEDS
    ),
    ("S-DPO is ahead of DPO", _SDPO, "DPO"),
    ("S-DPO is ahead of DPO on as many pairs", _SDPO, f"DPO, {K} pairs"),
    (f"K = {MANY} is ahead of K = {K}", _MANY, _SDPO),
    *(
        (f"beta = {BETA:g} is ahead of beta = {beta:g}", _SDPO, f"S-DPO, beta = {beta:g}")
        for beta in histories.BETAS
    ),
    *(
        (f"{name} negatives are ahead of uniform ones", f"S-DPO, {name} negatives", _SDPO)
        for name in histories.DRAWN
    ),
    (
        "redrawn negatives are ahead of the same ones twice",
        "S-DPO, 2 epochs, redrawn negatives",
        "S-DPO, 2 epochs",
    ),
    ("SFT of 2 epochs is ahead of 1", "SFT, 2 epochs", "SFT, 1 epoch"),
    ("histories of 10 titles are ahead of 3", "SFT", "SFT, 3 titles"),
    ("histories of 30 titles are ahead of 10", "SFT, 30 titles", "SFT"),
    (f"rank 64 is ahead of {histories.RANK}", "SFT, rank 64", "SFT"),
    (f"all weights are ahead of rank {histories.RANK}", "SFT, all weights", "SFT"),
    (
        "the paper's prompts are learnt better after histories",
        "SFT, the paper's prompts after histories",
        "SFT, the paper's prompts",
    ),
    (
        "S-DPO is ahead of SFT on the paper's prompts",
        "S-DPO, the paper's prompts",
        "SFT, the paper's prompts",
    ),
    (f"S-DPO, K = {MANY}, is ahead of SASRec", _MANY, "SASRec"),
    ("SFT is ahead of SASRec", "SFT", "SASRec"),
)


class Pair(NamedTuple):
    """The evaluations of a row: among the candidates, and over the catalogue."""

    candidates: Summary | None
    catalogue: Summary | None


def claims(place: Place) -> list[tuple[str, Row, Row]]:
    """(claim, the row that it says is ahead, the other one) of each claim whose rows are run."""
    rows = {row.label: row for row in histories.rows(place)}
    return [
        (claim, rows[first], rows[second])
        for claim, first, second in CLAIMS
        if first in rows and second in rows
    ]


def headline(places: Sequence[Place]) -> str:
    """The paper's first claim over the data sets."""
    claim = "S-DPO is ahead of SFT"
    found = collections.Counter()
    for place in places:
        first, second = next((a, b) for name, a, b in claims(place) if name == claim)
        pair = (find(place, row).candidates for row in (first, second))
        found[verdict(difference(*pair, at=1))] += 1
    counted = ", ".join(f"{name} on {n}" for name, n in found.items())
    return f"{claim}, HR@1 of 20, K = {K}: {counted} of {len(places)} data sets."


def verdict(d: Difference | None) -> str:
    if d is None:
        return NOTHING
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
    if not places:
        return []
    page: list[Part] = [Text(headline(places)), Text(about), Notes(LEGEND), *_claims(places)]
    for place in places:
        page += [Heading(DATASETS[place.dataset], 3), *_dataset(place, failed)]
    return page


def _claims(places: Sequence[Place]) -> list[Part]:
    """A table per end, with one line per claim and one column per data set."""
    of_places = [{claim: pair for claim, *pair in claims(place)} for place in places]
    names = list(dict.fromkeys(itertools.chain(*of_places)))
    header = ["claim", *(DATASETS[place.dataset] for place in places)]
    page: list[Part] = [Heading("Claims", 3)]
    tested = set[str]()
    for end, at, title in (
        (0, 1, "HR@1 among 20 candidates"),
        (1, CATALOGUE, f"HR@{CATALOGUE} over the catalogue"),
    ):
        columns = []
        for place, listed in zip(places, of_places, strict=True):
            found = {
                claim: difference(find(place, first)[end], find(place, second)[end], at)
                for claim, (first, second) in listed.items()
            }
            columns.append([_told(found.get(claim)) for claim in names])
        lines = [line for line in zip(names, *columns, strict=True) if set(line[1:]) != {NOTHING}]
        page += [Heading(title, 4), Table([header, *lines])] if lines else []
        tested |= {line[0] for line in lines}
    if rest := [name for name in names if name not in tested]:
        page.append(Notes([f"No figures yet: {'; '.join(rest)}."]))
    return page


def difference(a: Summary | None, b: Summary | None, at: int) -> Difference | None:
    return paired(a, b, at) if a and b and a["path"] != b["path"] else None


def _told(d: Difference | None) -> str:
    if d is None:
        return verdict(d)
    value, p = interval_and_p(d)
    return f"{verdict(d)}, p {p}:\n{value}"


def _dataset(place: Place, failed: Mapping[Path, str]) -> list[Part]:
    groups = histories.groups(place)
    systems = histories.systems(place)
    tuned = [row for row in systems if row.stage == "sdpo"]
    page: list[Part] = []
    shown: set[tuple[Path, str]] = set()
    for title, rows in groups.items():
        found = {(row.cell.folder, row.stage): row for row in rows if row.cell}
        there = {name: row for name, row in found.items() if any(find(place, row))}
        if there.keys() - shown:  # else the table would repeat rows of others
            page += [Heading(title, 4), _table(place, list(there.values()))]
        shown |= there.keys()
    page += _apart(place, systems)
    every = [row for rows in groups.values() for row in rows]
    lacking = [row for row in every if not find(place, row).candidates]
    said = [s for row in every for s in find(place, row) if s]
    page.append(Notes([*missing(lacking, failed), *protocols(said)]))
    return page + pictures(
        lambda: _over(place, histories.over_negatives(place), "K negatives"),
        lambda: _over(place, histories.over_betas(place), "beta"),
        lambda: curves(place, tuned, "validation/loss", "validation loss"),
        lambda: curves(place, tuned, "rewards/chosen", "reward of the preferred title"),
        lambda: curves(place, tuned, "rewards/rejected", "mean reward of the rejected titles"),
        lambda: curves(place, tuned, "logps/chosen", "log-prob of the preferred title"),
    )


def _apart(place: Place, rows: Sequence[Row]) -> list[Part]:
    """The same figures on windows with cold targets and with short histories."""
    if cells.prepared(place).left() or not (
        there := [row for row in rows if any(find(place, row))]
    ):
        return []
    groups = window_groups.read(place.data, place.split)
    ends = ("HR@1 of 20 [95%], n", f"HR@{CATALOGUE}, catalogue [95%], n")
    header = ["", *(f"{group}: {end}" for group in groups for end in ends)]
    lines = [[row.label, *_of_groups(find(place, row), groups.values())] for row in there]
    return [Heading("Cold targets and short histories", 4), Text(APART), Table([header, *lines])]


def _of_groups(found: Pair, groups: Iterable[Collection[int]]) -> list[str]:
    read = [(summary, read_predictions(summary) if summary else []) for summary in found]
    lines = []
    for rows in groups:
        for (summary, predictions), at in zip(read, (1, CATALOGUE), strict=True):
            chosen = [p for p in predictions if p["row"] in rows]
            if not summary or not chosen:
                lines.append("–")
                continue
            of_group = summarize(summary["decoder"], chosen, summary["rank"])
            lines.append(f"{ratio(of_group, f'hit_ratio_at_{at}')}, {len(chosen):,}")
    return lines


def _table(place: Place, rows: Sequence[Row]) -> Table:
    """One row per system."""
    sft = find(place, next(row for row in histories.systems(place) if row.system == "sft"))
    return Table([HEADER, *(_line(row, find(place, row), sft) for row in rows)])


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
