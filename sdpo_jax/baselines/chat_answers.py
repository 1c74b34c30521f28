"""The file of a chat model's answers, so that no request is sent twice.

A request is the JSON object sent: model, messages and parameters. An answer has the keys of
`ANSWER`. Its `seconds` count from the previous answer, so their sum is the total time of all runs.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import COUNT, NUMBER, TEXT, read_json_lines

ANSWER = {
    "key": TEXT,
    "endpoint": TEXT,
    "text": TEXT,
    "finish": TEXT,
    "tokens_in?": COUNT,
    "tokens_out?": COUNT,
    "seconds": NUMBER,
}
Request = dict[str, Any]
Answer = dict[str, Any]


def key_of(request: Request) -> str:
    """SHA-256 of a request, the same for every endpoint."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by key, without the unfinished last line of a killed process.

    Raises InputError naming file and line.
    """
    if not os.path.lexists(path):
        return {}
    found = read_json_lines(
        path, ANSWER, "expected answers of sdpo_jax.chatrec", "remove this line", unfinished=True
    )
    return {answer["key"]: answer for answer in found}


@contextlib.contextmanager
def appending(path: Path, started: float) -> Iterator[Callable[[Answer], None]]:
    """Yields a function that appends an answer with its seconds and returns once it is on disk.

    `started`: `time.monotonic()` from which the first answer's seconds count. Raises InputError if
    the file cannot be written or another process is appending to it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            last = started

            def append(answer: Answer) -> None:
                nonlocal last
                now = time.monotonic()
                answer["seconds"], last = round(now - last, 3), now
                file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

            yield append
    except BlockingIOError as error:
        raise InputError(
            f"{path}: another process is writing it: wait until it ends or choose another --workdir"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}): free space or correct "
            "permissions"
        ) from error
