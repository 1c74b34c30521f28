"""The command `sdpo`: `sdpo train …` is `python -m sdpo_jax.train …`."""

import ast
import difflib
import importlib.metadata
import runpy
import sys
from pathlib import Path

from sdpo_jax.system.command import fail

COMMANDS = (
    "prepare",
    "convert",
    "train",
    "evaluate",
    "recommend",
    "serve",
    "demo",
    "report",
    "export",
    "baselines",
    "chatrec",
    "leakcheck",
    "reproduce",
)


def main() -> None:
    """Runs the command that the first argument names; without one, lists them."""
    name, *options = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
    elif name == "--version":
        print(importlib.metadata.version("sdpo_jax"))
    elif name in COMMANDS:
        sys.argv = [f"sdpo {name}", *options]
        runpy.run_module(f"sdpo_jax.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        fail(f"sdpo: found the command {name!r}, expected one of {', '.join(COMMANDS)}{hint}")


def overview() -> str:
    """The commands, each with the first sentence of its own help."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about(name)}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: sdpo COMMAND [--option=value …]",
            "",
            *lines,
            "",
            "sdpo COMMAND --help lists a command's options.",
        ]
    )


def about(name: str) -> str:
    """The first line of a command's docstring, without loading what it imports."""
    file = Path(__file__).parent / f"{name}.py"
    if not file.exists():
        file = Path(__file__).parent / name / "__main__.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ")


if __name__ == "__main__":
    main()
