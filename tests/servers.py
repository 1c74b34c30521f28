"""`sdpo_jax.serve` as a process, for tests that need a real server."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from trainers import ROOT, environment


@contextlib.contextmanager
def served(
    run: Path, *flags: str, stderr: int | None = None
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of a server of a run's recommendations once it listens, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sdpo_jax.serve", f"--workdir={run}", f"--port={port}", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=stderr
    )
    assert process.stdout is not None
    try:
        address = f"http://127.0.0.1:{port}"
        assert any(f"{address}/" in line for line in iter(process.stdout.readline, ""))
        yield address, process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
