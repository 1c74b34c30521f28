"""The file of a chat model's answers, so that none is asked for twice.

A request is the JSON object that is sent: model, messages and parameters. An answer has the keys
of `ANSWER`; its `seconds` are those since the answer before it, so that their sum is how long the
asking took, over as many goes as it took.
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
from sdpo_jax.system.files import (
    COUNT,
    NUMBER,
    TEXT,
    read_json_lines,
)

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
    """SHA-256 of what is asked, wherever it is asked."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by key; a last line without its end, which a kill leaves, is not one of them."""
    if not os.path.lexists(path):
        return {}
    found = read_json_lines(
        path, ANSWER, "expected answers of sdpo_jax.chatrec", "remove this line", unfinished=True
    )
    return {answer["key"]: answer for answer in found}


@contextlib.contextmanager
def appending(path: Path, started: float) -> Iterator[Callable[[Answer], None]]:
    """Yields a function that adds an answer, with its seconds, and returns when it is on disk.

    `started` is the `time.monotonic()` from which the first one's seconds count.

    Raises InputError where the disk refuses, or another process has the file open so.
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
                last, before = time.monotonic(), last
                answer["seconds"] = round(last - before, 3)
                file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())

            yield append
    except BlockingIOError as error:
        raise InputError(
            f"{path}: another process is asking for it: wait for its end, or choose another "
            "--workdir"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: found {error.strerror or error}, expected to write it: free space or mend "
            "permissions"
        ) from error
