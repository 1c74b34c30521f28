"""Histories in a JSONL file, recommendations out: resumable, for as many people as the file has."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdpo_jax.serving.recommender import Recommender
from sdpo_jax.serving.titles import people
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import parse_json, read_object, write_json

CHUNK = 256  # people whose recommendations are written together


def score_file(recommender: Recommender, source: Path, output: Path, **options: Any) -> int:
    """Writes for each line {"history": […], …} its keys but the history, and "items".

    The file `output` appears when all is done. Until then the lines are in `output`.partial, and
    the same call goes on after them, with the batches of a call that was not stopped. Returns the
    number of people. Raises InputError naming the line.
    """
    if output.exists():
        raise InputError(f"--output: found {output}, expected a new file: remove it")
    total = sum(1 for _ in _records(source))
    partial = output.with_name(f"{output.name}.partial")
    question = output.with_name(f"{output.name}.partial.json")
    try:
        _same_question(question, recommender, source, options)
        _score_rest(recommender, source, partial, total, options)
        os.replace(partial, output)
        question.unlink()
    except OSError as error:
        raise InputError(f"--output={output}: {error.strerror or error}: give another") from error
    return total


def _same_question(file: Path, recommender: Recommender, source: Path, options) -> None:
    """Notes what is asked, or raises InputError where the partial file answers something else."""
    asked = {
        "input": hashlib.sha256(source.read_bytes()).hexdigest(),
        "model": recommender.identity,
        "options": options,
    }
    if not file.exists():
        partial = file.with_suffix("")
        if partial.exists():
            raise InputError(f"{partial}: found it without {file.name}, expected both: remove it")
        write_json(file, asked)
        return
    found = read_object(file, "expected what an unfinished call left: remove it")
    if changed := [key for key, value in asked.items() if found.get(key) != value]:
        raise InputError(
            f"{file}: found a call with another {', '.join(changed)}, expected the same as now: "
            "repeat that one, or remove this file and the one beside it"
        )


def _score_rest(
    recommender: Recommender, source: Path, partial: Path, total: int, options: dict[str, Any]
) -> None:
    """Appends what `partial` lacks, chunk by chunk."""
    done = _whole_chunks(partial)
    with partial.open("r+b" if partial.exists() else "wb") as file:
        file.truncate(_end_of_line(partial, done))
        file.seek(0, os.SEEK_END)
        records = itertools.islice(_records(source), done, None)
        with tqdm(total=total, initial=done, unit="person", mininterval=1) as bar:
            while chunk := list(itertools.islice(records, CHUNK)):
                file.write(_lines(recommender, source, chunk, options))
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(chunk))


def _records(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and records. Raises InputError for a line that is not what is expected."""
    try:
        with source.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = parse_json(line)
                except ValueError as error:
                    raise _bad(source, number, f"no valid JSON ({error})") from error
                if not isinstance(record, dict) or "history" not in record:
                    raise _bad(source, number, "no object with the key 'history'")
                yield number, record
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{source}: {error}, expected a JSONL file of histories: correct --input"
        ) from error


def _bad(source: Path, number: int, found: str) -> InputError:
    return InputError(
        f'{source}:{number}: found {found}, expected {{"history": [titles or ids], …}}'
    )


def _lines(recommender: Recommender, source: Path, chunk, options: dict[str, Any]) -> bytes:
    histories = []
    for number, record in chunk:
        try:
            (history,), _ = people(record["history"])
            histories.append([recommender.index.item(x, options["fuzzy"]) for x in history])
        except (InputError, ValueError) as error:
            raise InputError(f"{source}:{number}: {error}") from error
    found = recommender.ranked(histories, **options)
    lines = []
    for (_, record), listed in zip(chunk, found, strict=True):
        kept = {key: value for key, value in record.items() if key != "history"}
        lines.append(json.dumps(kept | {"items": as_records(listed)}, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()


def as_records(listed) -> list[dict[str, Any]]:
    return [{"id": one.item, "title": one.title, "score": one.score} for one in listed]


def _whole_chunks(partial: Path) -> int:
    """The number of lines of the chunks that were written to their end."""
    if not partial.exists():
        return 0
    data = partial.read_bytes()
    return data.count(b"\n") // CHUNK * CHUNK


def _end_of_line(partial: Path, count: int) -> int:
    """The number of bytes of the first `count` lines."""
    with partial.open("rb") as file:
        return sum(len(line) for line in itertools.islice(file, count))
