"""The data sets that `prepare` knows: the one place to add another."""

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

    `read` takes --source, which may be None where `files`, what it must be, is empty. `kept`: which
    interactions count. `rated`: ratings below 3 are no part of a sequence; `repeats`: a user may
    have an item several times. `split`, `min_interactions`, `min_history`: what holds without
    options; a source of fixed windows or splits has its own.
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
        "movie",  # without --domain
        read_csv,
        "ratings >= 3, or all rows where there is no rating, of an item the first, by time",
        "a CSV file",
    ),
}
