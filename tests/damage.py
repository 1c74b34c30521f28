"""What can happen to a file, as hypothesis strategies, and what every reader owes in return."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sdpo_jax.system.errors import InputError

# Put into the JSON text afterwards: json.dumps itself cannot write them.
DEEP = {
    '"@deep"': "[" * 500 + "]" * 500,
    '"@deeper"': '{"a":' * 50_000 + "1" + "}" * 50_000,
    '"@digits"': "9" * 5000,
}
NAMES = (
    "a\nb",
    "quo'te\"s",
    "<script>alert(1)</script>",
    "$(touch pwned)",
    "..",
    "../../x",
    "-rf",
    "\x1b[31mred",
    "x" * 300,
    "\udcff",
    "  ",
    "名",
)
ODD = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2.5,
    2**31,
    2**63,
    -(2**70),
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e308,
    "",
    " ",
    "1",
    "nan",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"": None},
    [1, "a"],
    "@deep",
    "@deeper",
    "@digits",
    *NAMES[:-3],
)
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.integers(-2, 9), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
)
BYTES = (
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\0",
    b"\r",
    b"\n",
    b'"',
    b"[",
    b"}",
    b"\x1b[31m",
    b"\xe2\x80\xa8",
    b"1e999",
    b"NaN",
    b"-",
)
INSTEAD = ("nothing", "a folder", "a link to itself", "a link to nothing", "an empty file")


def cases(count: int):
    """So many examples, the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def changed_json(text: str) -> st.SearchStrategy[str]:
    """One value replaced, one key or element taken away, or one added."""

    @st.composite
    def change(draw) -> str:
        content = [json.loads(text)]
        places = list(_places(content))
        # Half of them at the top, where few of a long file's values are.
        top = [(node, key) for node, key in places if node is content or node is content[0]]
        node, key = draw(st.sampled_from(top) | st.sampled_from(places))
        action = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add")))
        if action == "replace" or node is content:
            node[key] = draw(VALUES)
        elif action == "remove":
            del node[key]
        elif isinstance(node, dict):
            node[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            node.insert(key, draw(VALUES))
        return _written(content[0])

    return change()


def told_of_odd_values(path: Path, read: Callable[[], Any]) -> None:
    """The property for each odd value in each place of a JSON file, and without each key."""
    for content in _odd_contents(path.read_text()):
        path.write_text(content)
        told_or_done(read, path.parent)


def _odd_contents(text: str) -> Iterator[str]:
    count = len(list(_places([json.loads(text)])))
    for place in range(count):
        for value in (*ODD, ...):
            content = [json.loads(text)]
            node, key = list(_places(content))[place]
            if value is not ...:
                node[key] = value
                yield _written(content[0])
            elif isinstance(node, dict):
                del node[key]
                yield _written(content[0])


def _written(content: Any) -> str:
    written = json.dumps(content)
    for mark, deep in DEEP.items():
        written = written.replace(mark, deep)
    return written


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys:
        yield node, key
        yield from _places(node[key])


def changed_lines(text: bytes, separator: bytes = b"\n") -> st.SearchStrategy[bytes]:
    """A line taken away, twice there, in another's place, or each with a carriage return."""

    @st.composite
    def change(draw) -> bytes:
        lines = text.split(separator)
        one = draw(st.integers(0, len(lines) - 1))
        other = draw(st.integers(0, len(lines) - 1))
        action = draw(st.sampled_from(("remove", "repeat", "swap", "returns", "mark")))
        if action == "remove":
            del lines[one]
        elif action == "repeat":
            lines.insert(other, lines[one])
        elif action == "swap":
            lines[one], lines[other] = lines[other], lines[one]
        elif action == "mark":
            lines[0] = b"\xef\xbb\xbf" + lines[0]
        return (b"\r\n" if action == "returns" else separator).join(lines)

    return change()


def changed_bytes(content: bytes, head: int = 0) -> st.SearchStrategy[bytes]:
    """Cut anywhere, bits turned, or bytes written over; half of them within the first `head`."""
    where = st.integers(0, len(content))
    if head:
        where = where | st.integers(0, min(head, len(content)))

    @st.composite
    def change(draw) -> bytes:
        action = draw(st.sampled_from(("cut", "turn", "turn", "write", "insert")))
        place = draw(where)
        if action == "cut":
            return content[:place]
        if action == "turn":
            damaged = bytearray(content)
            for at in [place, *draw(st.lists(where, max_size=2))]:
                damaged[min(at, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
            return bytes(damaged)
        new = draw(st.sampled_from(BYTES) | st.binary(min_size=1, max_size=9))
        return content[:place] + new + content[place + len(new) * (action == "write") :]

    return change()


def changed_json_line(content: bytes) -> st.SearchStrategy[bytes]:
    """One line of JSONL changed as JSON."""

    @st.composite
    def change(draw) -> bytes:
        lines = content.decode().removesuffix("\n").split("\n")
        number = draw(st.integers(0, len(lines) - 1))
        lines[number] = draw(changed_json(lines[number]))
        return "\n".join([*lines, ""]).encode()

    return change()


def damage(path: Path) -> st.SearchStrategy[bytes | str]:
    """What the file at `path` may hold afterwards, or what may lie there instead of it."""
    content = path.read_bytes()
    kinds = [changed_bytes(content, 600), st.sampled_from(INSTEAD)]
    if path.suffix in (".json", ".index"):
        kinds += [changed_json(content.decode()).map(str.encode)] * 3
    elif path.suffix == ".jsonl":
        kinds += [changed_json_line(content)] * 3
    if path.suffix not in (".safetensors", ".zip"):
        kinds.append(changed_lines(content))
    return st.one_of(kinds)


def put(path: Path, content: bytes | str) -> None:
    path.unlink()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a folder":
        path.mkdir()
    elif content == "an empty file":
        path.touch()
    elif content != "nothing":
        path.symlink_to(path.name if content == "a link to itself" else "nowhere")


def tree(folder: Path) -> dict[str, Any]:
    """Every path below, hidden ones too, with what lies there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else None
    return found


def told_or_done(call: Callable[[], Any], folder: Path, *names: str) -> Any:
    """The property: `call` succeeds, or it says in one line what is wrong and writes nothing.

    The line has one of `names`, by default the folder's: the path of what was damaged, or a key.
    """
    before = tree(folder)
    try:
        return call()
    except InputError as error:
        line = " ".join(str(error).split())
        assert any(" ".join(name.split()) in line for name in names or (str(folder),)), line
        assert tree(folder) == before
        return None


def fresh(source: Path, target: Path) -> Path:
    """A copy of `source` in place of the last case's."""
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir(parents=True)
    shutil.copytree(source, target)
    return target
