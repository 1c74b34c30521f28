"""Serves recommendations over HTTP, with a page to try them.

    python -m sdpo_jax.serve --workdir=runs/quickstart/run --port=8000

The page is at /, the interface at /docs. Only this machine can connect unless --host says
otherwise. Then the environment variable SDPO_API_KEY must hold a key, which requests give as the
header X-API-Key. SIGTERM ends the server after the requests that it has accepted. Needs the extra
`serve`.
"""

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence

from absl import flags

from sdpo_jax.serving.recommender import BEAMS, Recommender
from sdpo_jax.serving.sources import Source, of_flags
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError

KEY = "SDPO_API_KEY"
CONNECTIONS = 500


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_free(host: str, port: int) -> None:
    """Raises InputError where the server could not listen, before the model is loaded."""
    try:
        with socket.create_server((host, port), family=_family(host)):
            pass
    except OSError as error:
        raise InputError(
            f"--host={host} --port={port}: found {error.strerror or error}, expected an address of "
            "this machine and a free port: give others"
        ) from error


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def serve(source: Callable[[], Source], host: str, port: int, beams: int = BEAMS) -> None:
    """Opens a source and serves it until a signal; checks first what could go wrong quickly.

    Raises InputError for an address that others can reach without a key, one that is taken, and
    missing packages.
    """
    key = os.environ.get(KEY, "")
    if not is_loopback(host) and not key:
        raise InputError(
            f"--host: found {host}, which others can reach, expected a key in the "
            f"environment variable {KEY}: set it, or leave the flag out"
        )
    try:
        import uvicorn

        from sdpo_jax.serving.connection import Connection
        from sdpo_jax.serving.server import make_app
    except ImportError as error:
        raise InputError(f"{error}: pip install -e '.[serve]'") from error
    check_free(host, port)
    app = make_app(Recommender(source(), beams=beams), key)
    print("warming up", flush=True)
    app.state.service.warm()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            print(f"open http://{host}:{port}/", flush=True)

    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Connection,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=60,
        server_header=False,
    )
    Server(config).run()


def main(argv: Sequence[str]) -> None:
    a = flags.FLAGS
    serve(
        lambda: of_flags(a.workdir, a.bundle, a.model, a.adapter, a.catalogue),
        a.host,
        a.port,
        a.beams,
    )


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "folder of the run; all its stages are served")
    flags.DEFINE_string("bundle", "", "folder of export --format=bundle, instead of a run")
    flags.DEFINE_string("model", "", "converted model, alone or as the base of a bundle's adapter")
    flags.DEFINE_string("adapter", "", "folder of PEFT's adapter, with --model")
    flags.DEFINE_string("catalogue", "", "folder of prepare, or items.jsonl, with --model")
    flags.DEFINE_string("host", "127.0.0.1", "address to listen on")
    flags.DEFINE_integer("port", 8000, "port to listen on", lower_bound=1, upper_bound=65535)
    flags.DEFINE_integer("beams", BEAMS, "width of the beam", lower_bound=1)
    run_command(main)
