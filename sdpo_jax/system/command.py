"""Commands: absl's flags, errors as one line, exit status 2."""

import gc
import io
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging

from sdpo_jax.system.errors import InputError, expand_home


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` under absl; an `InputError` ends in one line on stderr and exit status 2.

    ml_collections raises plain Python errors for a misspelt `--config.key`, a wrong type or a
    missing config file while flags are being parsed: those are told the same way.
    """

    def guarded(argv: Sequence[str]) -> None:
        # What is imported stays, and tracing makes much that lives on: looking at both again and
        # again took a tenth of a small run.
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding still shows titles
            if isinstance(stream, io.TextIOWrapper):  # what a notebook puts there is none
                stream.reconfigure(errors="backslashreplace")
        if not flags.FLAGS["verbosity"].present:
            # absl shows INFO by default, and Orbax writes thirty such lines a checkpoint.
            logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: options are written --name=value; see --help")
        try:
            main(argv)
        except InputError as error:
            fail(error)
        except BrokenPipeError:
            _end_quietly()

    app.run(guarded, flags_parser=_parse)


def fail(error: object) -> NoReturn:
    """Prints `error` on one line and exits with status 2.

    What is not printable, as a terminal's control sequences in a file's name, is escaped.
    """
    line = " ".join(str(error).split())
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"error: {''.join(escaped)}", file=sys.stderr)
    sys.exit(2)


def _end_quietly() -> NoReturn:
    """Whoever read the output has gone, as of `| head`: nothing more is said."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(
            [_packaged_config(_expanded(_underscored(argument))) for argument in argv]
        )
    except BrokenPipeError:  # of --help
        _end_quietly()
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OSError,
        ImportError,
        SyntaxError,
        RecursionError,
        MemoryError,
        InputError,
    ) as error:
        fail(_message_of(error))


def _underscored(argument: str) -> str:
    """`--some-option` as `--some_option`, which is how absl knows it."""
    name, equals, value = argument.partition("=")
    known = name.removeprefix("--").replace("-", "_")
    if not name.startswith("--") or not {known, known.removeprefix("no")} & set(flags.FLAGS):
        return argument
    return f"--{known}{equals}{value}"


NO_PATHS = ("delimiter", "quote")  # options whose value may be "~" itself


def _expanded(argument: str) -> str:
    """`--name=~/path` with the home folder, as a shell has it in a word of its own."""
    name, equals, value = argument.partition("=")
    if not (name.startswith("-") and value.startswith("~")) or name.strip("-") in NO_PATHS:
        return argument
    return f"{name}{equals}{expand_home(name, value)}"


def _packaged_config(argument: str) -> str:
    """`configs/…` of the package, in a clone or installed, where the current folder has none."""
    name, equals, value = argument.rpartition("=")
    file, colon, variant = value.partition(":")
    if not file.startswith("configs/") or os.path.exists(file):
        return argument
    package = pathlib.Path(__file__).parents[1]
    found = [home / file for home in (package, package.parent) if (home / file).is_file()]
    return f"{name}{equals}{found[0]}{colon}{variant}" if found else argument


def _message_of(error: Exception) -> str:
    """What absl or ml_collections found wrong with the command line, without their wrapping."""
    text = str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        hint = f": a config's key is --config.{error.flagname}" if "config" in flags.FLAGS else ""
        return f"--{error.flagname}: unknown option{hint}; see --help"
    if isinstance(error, RecursionError | MemoryError):
        return "found a value that is nested too deeply on the command line, expected a plain one"
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return f"--{missing[1]}: found nothing, expected a value: see --help"
    if error.args and isinstance(error.args[0], KeyError):  # ml_collections wraps it
        key, _, hint = str(error.args[0].args[0]).partition("\n")
        return f"--config: found the unknown key {key}, expected one of --help_config. {hint}"
    if "Traceback (most recent call last)" in text:  # of a config file that raised
        return f"{text.split(': ')[0]}: {text.strip().splitlines()[-1]}"
    return text
