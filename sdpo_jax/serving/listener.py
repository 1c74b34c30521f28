"""Serves recommendations on an address, after checks of what could go wrong quickly."""

import contextlib
import importlib
import ipaddress
import os
import socket
from collections.abc import Callable

from sdpo_jax.serving.recommender import BEAMS, Recommender
from sdpo_jax.serving.sources import Source
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


def check(host: str, port: int) -> None:
    """Raises InputError for an address that others can reach without a key, or that is taken, and
    for missing packages."""
    if not is_loopback(host) and not os.environ.get(KEY):
        raise InputError(
            f"--host: found {host}, which others can reach, expected a key in the "
            f"environment variable {KEY}: set it, or leave the flag out"
        )
    try:
        importlib.import_module("sdpo_jax.serving.server")
        importlib.import_module("sdpo_jax.serving.connection")
    except ImportError as error:
        raise InputError(f"{error}: pip install -e '.[serve]'") from error
    check_free(host, port)


def serve(source: Callable[[], Source], host: str, port: int, beams: int = BEAMS) -> None:
    """Opens a source and serves it until a signal. Raises what `check` raises, before."""
    check(host, port)
    import uvicorn

    from sdpo_jax.serving.connection import Connection, accept_the_last
    from sdpo_jax.serving.server import make_app

    app = make_app(Recommender(source(), beams=beams), os.environ.get(KEY, ""))
    print("warming up", flush=True)
    app.state.service.warm()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            print(f"open http://{host}:{port}/", flush=True)

        async def shutdown(self, sockets=None) -> None:
            await accept_the_last(self)
            await super().shutdown(sockets)

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
    with contextlib.suppress(KeyboardInterrupt):  # after the requests in flight
        Server(config).run()
