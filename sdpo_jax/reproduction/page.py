"""The parts of the page: each table and figure with the results so far, and the commands."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.data.paper import HIT_RATIO, SIZES
from sdpo_jax.data.prepared import read_meta
from sdpo_jax.data.readers.goodreads import STAND_IN
from sdpo_jax.evaluation.results import read_results
from sdpo_jax.reports import figures
from sdpo_jax.reports.document import Commands, Heading, Notes, Part, Picture, Table, Text
from sdpo_jax.reports.tables import interval_and_p, paired
from sdpo_jax.reproduction import cells, history_page
from sdpo_jax.reproduction.cells import BACKBONES, DATASETS, Cell, Place, Row, Study
from sdpo_jax.reproduction.figures_of import (
    Summary,
    curves,
    interval,
    missing,
    pictures,
    protocols,
    ratio,
)
from sdpo_jax.reproduction.plan import TARGETS, plan
from sdpo_jax.reproduction.running import pasted

TITLE = "The tables and figures of S-DPO"
TITLES = {
    "table1": "Table 1: recommenders",
    "table2": "Table 2: several negatives",
    "table3": "Table 3: data sets",
    "table4": "Table 4: other language models",
    "fig2": "Figure 2: SFT, DPO and S-DPO",
    "fig3": "Figure 3: number of negatives, and beta",
    "history": "Histories: the paper's claims where a small model can learn",
}
LEGEND = (
    "HR@1 and valid are the paper's metric: an answer is valid if it names exactly one of the "
    "candidates, and a hit if that is the target. Systems that rank answer with their first "
    "candidate. HR@1 by score takes the candidate with the highest log-probability.",
    "Intervals are 95%: Wilson's for ratios, Bonett & Price's for differences, on the windows that "
    "both systems share, both with the design effect of users. p is of the exact randomization "
    "test over users, which is McNemar's where each has one window. Others are compared with "
    f"S-DPO at K = {cells.K} and beta = {cells.BETA:g}.",
    "Step is the checkpoint with the lowest validation loss; at step 0 training never lowered it, "
    "and the row shows its starting point. A network's step is the epoch with the highest "
    "validation HR@1.",
    "The paper's figures are on its authors' candidates, ours on those of the protocol below each "
    "table; “–”: not available.",
)
HEADER = (
    "",
    "HR@1 [95%]",
    "valid [95%]",
    "HR@1 by score [95%]",
    "n",
    "step",
    "seed",
    "S-DPO minus it [95%]",
    "p",
)


@dataclasses.dataclass(frozen=True)
class Found:
    """Evaluations of a row by the paper's metric (`said`) and by score; None: missing."""

    row: Row
    said: Summary | None
    scored: Summary | None


def parts(
    study: Study, wanted: Mapping[str, Sequence[str]], failed: Mapping[Path, str]
) -> list[Part]:
    """The page of `wanted` (target -> data sets); `failed`: folder -> why its cell failed."""
    model = study.model or "SmolLM2-135M-Instruct, the default"
    page: list[Part] = [
        Text(f"Chen et al. 2024, arXiv 2406.09215. Language model: {model}."),
        *([Text(study.scale.about), Notes(LEGEND)] if set(wanted) - {"history"} else []),
    ]
    for target, datasets in wanted.items():
        out = {name: why for name in datasets if (why := cells.left_out(study, name))}
        there = [name for name in datasets if name not in out]
        page += [Heading(TITLES[target]), *SECTIONS[target](study, there, failed)]
        if out:
            page.append(Notes([f"{DATASETS[name]}: {why}" for name, why in out.items()]))
    return [*page, *_commands(study, plan(study, wanted), failed)]


def find(place: Place, row: Row) -> Found:
    """The latest evaluations of the row on the study's windows."""
    if row.cell is None:
        return Found(row, None, None)
    found = {
        summary["decoder"]: summary
        for summary in read_results(row.cell.folder / "eval")
        if (summary["stage"], summary["split"]) == (row.stage, place.split)
        and summary["rank"] == "candidates"
    }
    # A network only ranks: its score is already its figure by the paper's metric.
    scored = None if row.decoder == "score" else found.get("score")
    return Found(row, found.get(row.decoder), scored)


def results(place: Place, rows: Sequence[Row], failed: Mapping[Path, str]) -> list[Part]:
    """A table of HR@1; below it the missing rows and the protocol."""
    found = [find(place, row) for row in rows]
    ours = find(place, cells.row(place, "sdpo")).said
    lines = [HEADER, *(_line(one, ours) for one in found)]
    known = place.of_the_paper and not place.backbone
    published = HIT_RATIO.get(place.dataset, {}) if known else {}
    if any(row.system in published for row in rows):
        column = ["the paper's", *(_published(published.get(row.system)) for row in rows)]
        lines = [[*line[:2], paper, *line[2:]] for line, paper in zip(lines, column, strict=True)]
    lacking = [one.row for one in found if not one.said]
    said = [one.said for one in found if one.said]
    return [Table(lines), Notes([*missing(lacking, failed), *protocols(said)])]


def _line(found: Found, ours: Summary | None) -> list[str]:
    said = found.said or {}
    difference = None
    if found.said and ours and found.said["path"] != ours["path"]:
        difference = paired(ours, found.said)
    return [
        found.row.label,
        ratio(found.said, "hit_ratio_at_1"),
        ratio(found.said, "valid_ratio"),
        ratio(found.scored, "hit_ratio_at_1"),
        *(str(said.get(key, "–")) for key in ("n", "step", "seed")),
        *(("–", "–") if difference is None else interval_and_p(difference)),
    ]


def _published(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _by_dataset(study: Study, datasets: Sequence[str], make: Callable[[Place], list[Part]]):
    return [
        part
        for dataset in datasets
        for part in (Heading(DATASETS[dataset], 3), *make(Place(study, dataset)))
    ]


def _table(target: str):
    """A section with one table of results per data set."""

    def section(study: Study, datasets: Sequence[str], failed: Mapping[Path, str]) -> list[Part]:
        return _by_dataset(
            study, datasets, lambda place: results(place, TARGETS[target](place), failed)
        )

    return section


def _table3(study: Study, datasets: Sequence[str], failed: Mapping[Path, str]) -> list[Part]:
    header = ("", "users", "the paper's", "items", "the paper's", "interactions", "the paper's")
    lines, notes = [], []
    for dataset in datasets:
        place = Place(study, dataset)
        cell = cells.prepared(place)
        sizes: Sequence[Any] = ("–", "–", "–")
        if cell.left():
            notes.append(f"{DATASETS[dataset]}: {failed.get(cell.folder, 'not run yet')}")
        else:
            meta = read_meta(cell.folder)
            sizes = [
                meta.get("counts", {}).get(key, "–") for key in ("users", "items", "interactions")
            ]
            stand_in = "a stand-in, as the paper's sequences are not public; "
            about = stand_in if STAND_IN[0] in meta.get("source", {}) else ""
            notes.append(f"{DATASETS[dataset]}: {about}{meta.get('protocol')}.")
        published = SIZES.get(dataset) if place.of_the_paper else None
        pairs = zip(sizes, published or ("–",) * 3, strict=True)
        lines.append([DATASETS[dataset], *(_count(size) for pair in pairs for size in pair)])
    return [Table([header, *lines]), Notes(notes)]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table4(study: Study, datasets: Sequence[str], failed: Mapping[Path, str]) -> list[Part]:
    page: list[Part] = []
    for dataset in datasets:
        for backbone, rows in cells.backbones(Place(study, dataset)).items():
            page.append(Heading(f"{DATASETS[dataset]}, {BACKBONES[backbone]}", 3))
            page += results(Place(study, dataset, backbone), rows, failed)
    lacking = [
        f"{title}: needs --{name}=FOLDER, written by sdpo_jax.convert"
        for name, title in BACKBONES.items()
        if not study.backbones.get(name)
    ]
    return [*page, *([Notes(lacking)] if lacking else [])]


def _figure2(study: Study, datasets: Sequence[str], failed: Mapping[Path, str]) -> list[Part]:
    def make(place: Place) -> list[Part]:
        rows = cells.figure2(place)
        return [
            *results(place, rows, failed),
            *pictures(
                lambda: _bars(place, rows),
                lambda: curves(
                    place,
                    rows,
                    "validation/loss",
                    "(b) validation loss, at first log(K + 1)",
                ),
                lambda: curves(place, rows, "rewards/chosen", "(c) reward of the preferred title"),
            ),
        ]

    return _by_dataset(study, datasets, make)


def _figure3(study: Study, datasets: Sequence[str], failed: Mapping[Path, str]) -> list[Part]:
    def make(place: Place) -> list[Part]:
        negatives, betas = cells.over_negatives(place), cells.over_betas(place)
        return [
            *results(place, negatives, failed),
            *pictures(lambda: _over(place, negatives, "a", "K negatives", "hit_ratio_at_1")),
            *results(place, betas, failed),
            *pictures(
                lambda: _over(place, betas, "b", "beta", "hit_ratio_at_1"),
                lambda: _over(place, betas, "c", "beta", "valid_ratio"),
            ),
        ]

    return _by_dataset(study, datasets, make)


def _bars(place: Place, rows: Sequence[Row]) -> Picture | None:
    found = [(row, said) for row in rows if (said := find(place, row).said)]
    if not found:
        return None
    values = [interval(said, "hit_ratio_at_1") for _, said in found]
    svg = figures.bars(f"{place.dataset} 2a", [row.label for row, _ in found], values, "HR@1")
    return Picture(svg, f"{DATASETS[place.dataset]}: (a) HR@1")


def _over(place: Place, rows: Sequence[Row], part: str, axis: str, key: str) -> Picture | None:
    found = [(row, said) for row in rows if (said := find(place, row).said)]
    if not found:
        return None
    unit = "HR@1" if key == "hit_ratio_at_1" else "valid ratio"
    svg = figures.over(
        f"{place.dataset} 3{part}",
        [row.at for row, _ in found],
        [interval(said, key) for _, said in found],
        axis,
        unit,
    )
    return Picture(svg, f"{DATASETS[place.dataset]}: ({part}) {unit} over {axis}")


SECTIONS = {
    "table1": _table("table1"),
    "table2": _table("table2"),
    "table3": _table3,
    "table4": _table4,
    "fig2": _figure2,
    "fig3": _figure3,
    "history": history_page.section,
}


def _commands(study: Study, every: Sequence[Cell], failed: Mapping[Path, str]) -> list[Part]:
    """The commands and the state of each cell."""
    page: list[Part] = [
        Heading("Commands"),
        Text("In this order, from the root of the clone. Each folder is made once."),
    ]
    for cell in every:
        state = failed.get(cell.folder, "not run yet" if cell.left() else "done")
        page.append(Heading(f"{cell.folder.relative_to(study.root)}: {state}", 3))
        page.append(Commands([pasted(step.command) for step in cell.steps]))
    return page
