"""Windows of a source, by its data set's protocol and the options that override it."""

import dataclasses
from pathlib import Path

from sdpo_jax.data import sequences
from sdpo_jax.data.catalogue import DATASETS, Source
from sdpo_jax.data.interactions import Interactions
from sdpo_jax.data.prepared import User, UserSequence, Window, is_title
from sdpo_jax.data.readers.csv_file import Form
from sdpo_jax.data.readers.sources import Sequences, Sessions
from sdpo_jax.data.text import has_entity, misread, plain
from sdpo_jax.system.errors import InputError, brief

VAGUE = 0.95  # share of equal neighbouring times from which a user's order counts as unknown

_SPLIT = {
    "users": "users by first interaction, 8:1:1; history {} items; train: every window, val and "
    "test: the last window of each user, val_all and test_all: every window of those users",
    "time": "windows by the time of their target, 8:1:1, a user may be in each; history {} items; "
    "every window",
    "leave-one-out": "of each user the last window is test, the one before it val, the others "
    "train; history {} items",
}
SPLITS = tuple(_SPLIT)
_LAST = _SPLIT["users"].partition("; ")[2]
_STAND_IN = "goodbooks-10k's sequences and users per split, titles cut at '('; " + _LAST
_PUBLISHED = (
    "the published windows, split by the time of their target; history {} items, which may hold "
    "the target, and then no other candidate"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command line that override the protocol; None: the data set's default."""

    split: str | None = None
    history: int | None = None
    min_interactions: int | None = None
    num_candidates: int | None = None
    allow_ties: bool = False


@dataclasses.dataclass(frozen=True)
class Found:
    """Windows before candidates are drawn, and their description for dataset.json.

    `notes`: notes to the user about the source, one line each.
    """

    titles: dict[int, str]
    attributes: dict[int, dict]
    sequences: dict[User, UserSequence]
    windows: dict[str, list[Window]]
    protocol: str
    split: str
    history: int
    least: int
    kept: int
    count: int
    untitled: tuple[int, int]
    source: dict[str, str]
    notes: tuple[str, ...] = ()


def read_windows(
    dataset: str, source: str | None, options: Options, seed: int = 0, form: Form | None = None
) -> Found:
    """Reads `source` and cuts it into windows.

    `seed`: of the order of interactions with equal times; `form`: of a CSV file. Raises InputError
    for errors in the source, and for an option that does not apply to it.
    """
    known = DATASETS[dataset]
    if not source and known.files:
        raise InputError(f"--source: found nothing, expected {known.files}: see --help")
    path = Path(source) if source else None
    read = known.read(path, form) if form else known.read(path)
    where = source or dataset
    notes = _notes_of(read.titles)
    read = dataclasses.replace(read, titles={i: plain(title) for i, title in read.titles.items()})
    if isinstance(read, Interactions):
        found = _from_interactions(read, known, options, where, seed)
    else:
        found = _from_splits(read, dataset, options)
    for name, rows in found.windows.items():
        if not rows:
            raise InputError(
                f"{where}: found no window with {known.min_history} items of history in {name} "
                f"from {found.kept:,} of {found.count:,} interactions ({known.kept}), expected "
                "at least one: give a source with more users and interactions"
            )
    for item, title in found.titles.items():
        if not is_title(title):
            raise InputError(
                f"{where}: found title {brief(title)} of item {item}, expected one line of text: "
                "correct --source"
            )
    seen = {window.user for rows in found.windows.values() for window in rows}
    users = {user: sequence for user, sequence in found.sequences.items() if user in seen}
    notes = (*found.notes, *notes, *_titles_again(found))
    return dataclasses.replace(found, sequences=users, notes=notes)


def _notes_of(titles: dict[int, str]) -> list[str]:
    """Notes on entities and encoding errors in titles."""
    entities = sum(map(has_entity, titles.values()))
    read = [(title, misread(title)) for title in titles.values()]
    lost = sum("\ufffd" in title + before for title, before in read)
    wrong = [(title, before) for title, before in read if before and "\ufffd" not in before]
    notes = []
    if entities:
        notes.append(f"HTML entities are resolved in {entities:,} titles")
    if lost:
        notes.append(f"{lost:,} titles hold a character that was lost before, in another encoding")
    if wrong:
        notes.append(
            f"{len(wrong):,} titles seem to be UTF-8 that was read as Latin-1, as "
            f"{brief(wrong[0][0])} for {brief(wrong[0][1])}: they are kept as they are"
        )
    return notes


def _titles_again(found: Found) -> list[str]:
    """A note on targets whose title the history has under another id."""
    titles, splits = found.titles, found.windows
    # test_all contains the windows of test.
    windows = [w for name in splits if f"{name}_all" not in splits for w in splits[name]]
    again = sum(
        window.target not in window.history
        and titles[window.target] in {titles[item] for item in window.history}
        for window in windows
    )
    if not again:
        return []
    return [
        f"in {again:,} of {len(windows):,} windows the target has the same title as an item of the "
        "history"
    ]


def _check_times(
    where: str, by_user: sequences.Histories, rounded: str, shortest: int, allow: bool
) -> list[str]:
    """Notes on equal times of users with more than `shortest` items.

    Raises InputError if they leave the order of most users unknown, or result from rounding, unless
    `allow` is true.
    """
    pairs = {user: len(by_user.sequences[user].items) - 1 for user in by_user.tied}
    pairs = {user: count for user, count in pairs.items() if count >= shortest}
    shares = [by_user.tied[user] for user in pairs]
    tied = sum(share * count for share, count in zip(shares, pairs.values(), strict=True))
    if not tied:
        return [f"{rounded}: no order is lost"] if rounded else []
    share = f"{tied / sum(pairs.values()):.1%} of neighbouring interactions have the same time"
    if rounded and not allow:
        raise InputError(
            f"{rounded}, so that {share}, expected whole numbers: save the column again as numbers "
            "without an exponent"
        )
    vague = sum(tied_share >= VAGUE for tied_share in shares)
    if 2 * vague > len(shares) and not allow:
        raise InputError(
            f"{where}: {share} ({VAGUE:.0%} or more for {vague:,} of {len(shares):,} users), "
            "expected times that determine an order: give finer ones, or --allow_ties to draw it"
        )
    return [f"{share}: their order is drawn from the seed"]


def _from_interactions(
    read: Interactions, known: Source, options: Options, where: str, seed: int
) -> Found:
    split = options.split or known.split
    least = options.min_interactions or known.min_interactions
    N = options.history or sequences.MAX_HISTORY
    shortest = min(known.min_history, N)
    by_user = sequences.by_user(
        read, rated=known.rated, repeats=known.repeats, least=least, seed=seed
    )
    users = by_user.sequences
    if not users:
        raise InputError(
            f"{where}: found no users and items with {least} interactions among {read.count:,} "
            f"({known.kept}), expected some: correct --source or lower --min_interactions"
        )
    times = _check_times(where, by_user, read.rounded, shortest, options.allow_ties)
    notes = (*read.notes, *times)
    if split == "users":
        windows = sequences.last_windows(sequences.split_users(users), N, shortest)
    elif split == "time":
        windows = sequences.windows_by_time(by_user, N, shortest)
    else:
        windows = sequences.leave_one_out(users.values(), N, shortest)
    titles = read.titles
    if least > 1:
        kept = {item for sequence in users.values() for item in sequence.items}
        titles = {item: title for item, title in titles.items() if item in kept}
    core = f"users and items with {least} or more; " if least > 1 else ""
    protocol = f"{known.kept}; {core}{_SPLIT[split].format(f'{shortest} to {N}')}"
    return Found(
        titles,
        {item: read.attributes[item] for item in titles},
        users,
        windows,
        protocol,
        split,
        N,
        least,
        sum(len(user.items) for user in users.values()),
        read.count,
        read.untitled,
        read.source,
        notes,
    )


def _from_splits(read: Sequences | Sessions, dataset: str, options: Options) -> Found:
    """Windows of a source with published splits; those of `Sessions` are published too."""
    N = (isinstance(read, Sequences) and options.history) or sequences.MAX_HISTORY
    for name, value in dataclasses.asdict(options).items():
        if value and name != "num_candidates" and (name != "history" or value != N):
            raise InputError(
                f"--{name}: found {value}, expected none for this {dataset}, whose "
                f"{'splits' if isinstance(read, Sequences) else 'windows'} are those of its "
                "authors: leave it out"
            )
    if isinstance(read, Sequences):
        users = {user: s for part in read.splits.values() for user, s in part.items()}
        shortest = min(sequences.MIN_HISTORY, N)
        windows = sequences.last_windows(read.splits, N, shortest)
        protocol = _STAND_IN.format(f"{shortest} to {N}")
    else:
        users, windows = read.sequences, read.windows
        protocol = _PUBLISHED.format("1 to 10")
        if dataset == "lastfm":
            protocol = f"{DATASETS[dataset].kept}; history 3 to 10 items; every window"
    kept = sum(len(user.items) for user in users.values())
    attributes: dict[int, dict] = {item: {} for item in read.titles}
    return Found(
        read.titles,
        attributes,
        users,
        windows,
        protocol,
        "fixed",
        N,
        1,
        kept,
        kept,
        (0, 0),
        read.source,
    )
