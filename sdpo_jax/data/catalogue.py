"""The data sets of `prepare`; add another here."""

import dataclasses
from collections.abc import Callable

from sdpo_jax.data.interactions import Interactions
from sdpo_jax.data.readers.amazon import read_amazon
from sdpo_jax.data.readers.csv_file import read_csv
from sdpo_jax.data.readers.goodreads import read_goodreads
from sdpo_jax.data.readers.lastfm import read_lastfm
from sdpo_jax.data.readers.movielens import read_movielens
from sdpo_jax.data.readers.sources import Sequences, Sessions
from sdpo_jax.data.sequences import MIN_HISTORY


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set and its protocol.

    `read`: reader of --source; it accepts None if `files`, the description of --source, is empty.
    `kept`: which interactions count. `rated`: sequences exclude ratings below 3. `repeats`: a user
    may have an item several times. `split`, `min_interactions`, `min_history`: defaults; a source
    with fixed windows or splits has its own.
    """

    domain: str
    read: Callable[..., Interactions | Sequences | Sessions]
    kept: str
    files: str = ""
    rated: bool = True
    repeats: bool = False
    split: str = "users"
    min_interactions: int = 1
    min_history: int = MIN_HISTORY


DATASETS = {
    "movielens": Source("movie", read_movielens, "ratings >= 3 by time"),
    "lastfm": Source(
        "music",
        read_lastfm,
        "the authors' sequences and users per split, which follow one order of the artists and not "
        "time, so the next candidate in that order scores HR@1 0.76",
        "a folder with the LastFM files",
    ),
    "goodreads": Source(
        "book",
        read_goodreads,
        "ratings >= 3 of books with a title, cut at '(', by time",
        "a folder with the Goodreads files",
        min_interactions=20,
    ),
    "amazon": Source(
        "product",
        read_amazon,
        "every review of an item with a title, by time, repeated ones too, so a history may hold "
        "its target, and then no other candidate",
        "a folder with the Amazon files",
        rated=False,
        repeats=True,
        split="time",
        min_interactions=5,
        min_history=1,
    ),
    "csv": Source(
        "movie",  # unless --domain is given
        read_csv,
        "ratings >= 3, or all rows where there is no rating, of an item the first, by time",
        "a CSV file",
    ),
}
