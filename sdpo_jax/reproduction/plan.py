"""What can be asked for, and the cells that it needs, each once and in order."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from sdpo_jax.reproduction import cells, histories
from sdpo_jax.reproduction.cells import Cell, Place, Row, Study

# Target -> its rows; Table 3 describes data only.
TARGETS: dict[str, Callable[[Place], list[Row]]] = {
    "table1": cells.table1,
    "table2": cells.table2,
    "table3": lambda place: [],
    "table4": cells.table4,
    "fig2": cells.figure2,
    "fig3": lambda place: cells.over_negatives(place) + cells.over_betas(place),
    "history": histories.rows,
}


def plan(study: Study, wanted: Mapping[str, Iterable[str]]) -> list[Cell]:
    """All cells of `wanted` (target -> data sets), each once and after the cells it needs.

    The first row of every data set comes before the second of any.
    """
    planned: dict[Path, Cell] = {}

    def add(cell: Cell) -> None:
        for needed in cell.needs:
            add(needed)
        planned.setdefault(cell.folder, cell)

    for target, datasets in wanted.items():
        places = [Place(study, name) for name in datasets if not cells.left_out(study, name)]
        for place in places:
            add(cells.prepared(place))
        for of_places in itertools.zip_longest(*(TARGETS[target](place) for place in places)):
            for row in of_places:
                if row and row.cell:
                    add(row.cell)
    return list(planned.values())
