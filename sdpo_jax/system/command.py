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

    So do the plain Python errors that ml_collections raises while it parses flags, for a misspelt
    `--config.key`, a wrong type or a missing config file.
    """

    def guarded(argv: Sequence[str]) -> None:
        # Imported objects and those that tracing makes live on: collecting garbage among them took
        # a tenth of a small run.
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        for stream in (sys.stdout, sys.stderr):  # a terminal of another encoding still shows titles
            if isinstance(stream, io.TextIOWrapper):  # in a notebook it is not
                stream.reconfigure(errors="backslashreplace")
        if not flags.FLAGS["verbosity"].present:
            # absl shows INFO by default, and Orbax logs thirty such lines per checkpoint.
            logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: options are written --name=value; see --help")
        try:
            main(argv)
        except InputError as error:
            fail(error)
        except BrokenPipeError:
            _end_quietly()
        except RuntimeError as error:  # JAX's errors are
            if not (found := _out_of_memory(error)):
                raise
            fail(
                f"the device's memory: found too little ({found}), expected room for a batch: "
                "lower --config.microbatch or --batch_size, or run fewer programs on the device"
            )

    app.run(guarded, flags_parser=_parse)


def _out_of_memory(error: RuntimeError) -> str:
    """The line of JAX's message that says that the device's memory is full; "" if none does.

    Where a GPU's matrix library finds no room for itself, the message names it alone.
    """
    signs = ("RESOURCE_EXHAUSTED", "BlasLt is unavailable")
    lines = str(error).splitlines()
    return next((line.strip(" -") for line in lines if any(sign in line for sign in signs)), "")


def fail(error: object) -> NoReturn:
    """Prints `error` on one line and exits with status 2.

    Unprintable characters, such as a terminal's control sequences in a file name, are escaped.
    """
    line = " ".join(str(error).split())
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    print(f"error: {''.join(escaped)}", file=sys.stderr)
    sys.exit(2)


def _end_quietly() -> NoReturn:
    """The reader of the output has gone, as in `| head`: ends without a message."""
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
    """`--some-option` as `--some_option`, absl's name of it."""
    name, equals, value = argument.partition("=")
    known = name.removeprefix("--").replace("-", "_")
    if not name.startswith("--") or not {known, known.removeprefix("no")} & set(flags.FLAGS):
        return argument
    return f"--{known}{equals}{value}"


NO_PATHS = ("delimiter", "quote")  # options whose value may be "~" itself


def _expanded(argument: str) -> str:
    """`--name=~/path` with the home folder; a shell only expands a leading "~"."""
    name, equals, value = argument.partition("=")
    if not (name.startswith("-") and value.startswith("~")) or name.strip("-") in NO_PATHS:
        return argument
    return f"{name}{equals}{expand_home(name, value)}"


def _packaged_config(argument: str) -> str:
    """`configs/…` of the package, cloned or installed, if the current folder has no such file."""
    name, equals, value = argument.rpartition("=")
    file, colon, variant = value.partition(":")
    if not file.startswith("configs/") or os.path.exists(file):
        return argument
    package = pathlib.Path(__file__).parents[1]
    found = [home / file for home in (package, package.parent) if (home / file).is_file()]
    return f"{name}{equals}{found[0]}{colon}{variant}" if found else argument


def _message_of(error: Exception) -> str:
    """The error of absl or ml_collections about the command line, without its wrapping."""
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
