"""Serves recommendations over HTTP, with a page to try them.

    python -m sdpo_jax.serve --workdir=runs/quickstart/run --port=8000

The page is at /, the interface at /docs. Only this machine can connect unless --host says
otherwise. Then the environment variable SDPO_API_KEY must hold a key, which requests give as the
header X-API-Key. SIGTERM ends the server after the requests that it has accepted. Needs the extra
`serve`.
"""

from collections.abc import Sequence

from absl import flags

from sdpo_jax.serving.listener import serve
from sdpo_jax.serving.recommender import BEAMS
from sdpo_jax.serving.sources import of_flags
from sdpo_jax.system.command import run_command


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
