"""A run's results in one table, its stages compared, and a plot of its curves.

    python -m sdpo_jax.report --workdir=runs/movielens/run

Prints the table and writes report.md and, with matplotlib, curves.png into the run's folder.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sdpo_jax.reports import curves_plot, tables
from sdpo_jax.runs.curves import read_metrics
from sdpo_jax.runs.workdir import read_run
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import whole_file


def report(workdir: str | Path, split: str | None = None) -> str:
    """Writes report.md and curves.png into `workdir` and returns the text of report.md.

    `split` defaults to the one evaluated last. Raises InputError if `workdir` is not a run, has no
    evaluation, or cannot be written.
    """
    run = read_run(Path(workdir))
    split, rows = tables.choose_rows(run, split)
    lines = read_metrics(run.path / "metrics")
    try:
        picture = _picture(run, lines)
        text = tables.render(run, split, rows, picture)
        with whole_file(run.path / "report.md") as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{run.path}: the report cannot be written ({error.strerror}): free space or correct "
            "permissions"
        ) from error
    return text


def _picture(run, lines: Sequence[dict]) -> str | None:
    """File name of the plot; None without matplotlib or without curves."""
    if not any("loss" in line for line in lines):
        return None
    try:
        curves_plot.draw(lines, run.config, run.path / "curves.png")
    except ImportError:
        print("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    return "curves.png"


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    print(report(args.workdir, args.split))
    print(f"written to {args.workdir}/report.md")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "folder of the run", required=True)
    flags.DEFINE_string("split", None, "evaluated split; default: the one evaluated last")
    run_command(main)
