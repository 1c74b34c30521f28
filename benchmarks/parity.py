"""One float32 step of a small random model on this device, compared with the CPU's stored values.

    python -m benchmarks.parity --output=FILE.json

Random numbers of JAX are the same on all devices. Also compared: the packed layout with full rows,
and bfloat16, with the device's attention kernel, with float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import workload
from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Example
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.objectives.losses import sdpo_loss
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import read_object, write_json
from sdpo_jax.system.processes import set_up_jax
from sdpo_jax.training.step import make_logp

STORED = Path(__file__).parent / "parity.json"
CONFIG = DecoderConfig(V=512, L=2, D=128, N=4, G=2, H=32, F=256)
TOLERANCE = 1e-4  # of float32: nats of a log-prob, and a share of a gradient's norm
K = 3


def examples() -> dict[str, list[Example]]:
    """Two prompts among candidates and two histories of three targets, of unequal lengths."""
    rng = np.random.default_rng(0)

    def words(count: int) -> np.ndarray:
        return rng.integers(2, CONFIG.V, count).astype(np.int32)

    def answers(first: np.ndarray) -> tuple[np.ndarray, ...]:
        return (first, *(words(int(rng.integers(2, 6))) for _ in range(K)))

    candidates = [Example.single(words(n), answers(words(4))) for n in (150, 97)]
    histories = []
    for head in (9, 14):
        titles = [words(int(rng.integers(3, 7))) for _ in range(3)]
        begins = np.cumsum([head, *map(len, titles[:-1])])
        prompt = np.concatenate([words(head), *titles])[:-1]
        places = tuple(int(begin) - 1 for begin in begins)
        histories.append(Example(prompt, places, tuple(map(answers, titles)), continued=True))
    return {"candidates": candidates, "history": histories}


def values(layout: str, dtype: str) -> dict[str, dict[str, Any]]:
    """Per kind of prompt: log-probs, loss, and the norm of each adapter's gradient."""

    def make(dtype) -> Decoder:
        settings = {"remat": "cheap", "platform": jax.default_backend(), "rngs": nnx.Rngs(0)}
        return Decoder(CONFIG, LoraConfig(), dtype=dtype, **settings)

    @jax.jit  # one program: a GPU would compile each operation of it for itself
    def weights():
        # The random numbers of a bfloat16 model would be others.
        _, adapter, base = nnx.split(make(jnp.float32), nnx.LoRAParam, ...)
        base = jax.tree.map(lambda x: x.astype(dtype), base)
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(adapter))))
        adapter = jax.tree.map(lambda x: 0.02 * jax.random.normal(next(keys), x.shape), adapter)
        return adapter, base

    adapter, base = weights()
    graphdef = nnx.split(nnx.eval_shape(lambda: make(jnp.dtype(dtype))))[0]
    logp = make_logp(graphdef, layout)

    @jax.jit
    def run(adapter, base, batch):
        def loss(adapter):
            logp_BMC = logp(adapter, base, batch)
            loss_BM = sdpo_loss(logp_BMC, jnp.zeros_like(logp_BMC), 1.0)
            return jnp.where(batch["place_BM"] >= 0, loss_BM, 0).sum(), logp_BMC

        (total, logp_BMC), gradient = jax.value_and_grad(loss, has_aux=True)(adapter)
        return logp_BMC, total, jax.tree.map(jnp.linalg.norm, gradient)

    found = {}
    for kind, given in examples().items():
        batch = loader.collate(given, loader.choose_shapes([given], 1)[0], 1)
        logp_BMC, total, norms = jax.device_get(run(adapter, base, batch))
        found[kind] = {
            "logp": np.asarray(logp_BMC).ravel().tolist(),
            "loss": float(total),
            "norms": [float(x) for x in jax.tree.leaves(norms)],
        }
    return found


def differences(found: dict, expected: dict) -> dict[str, float]:
    """The largest difference of log-probs in nats, and of gradient norms as a share."""
    logp = norms = 0.0
    for kind in expected:
        (a, b), (x, y) = (
            (np.array(side[kind][key]) for side in (found, expected)) for key in ("logp", "norms")
        )
        logp = max(logp, float(np.abs(a - b).max()))
        norms = max(norms, float((np.abs(x - y) / y).max()))
    return {"logp": logp, "gradient": norms}


def benchmark() -> dict:
    """Differences of this device from the CPU, of the layouts, and of bfloat16 from float32."""
    set_up_jax("float32")
    found = {}

    def compare(name: str, one: dict, expected: dict) -> None:
        found[name] = of = differences(one, expected)
        print(
            f"{name}: log-probs {of['logp']:.1e} nats, gradients {of['gradient']:.1e}", flush=True
        )

    packed = values("shared_prefix", "float32")
    stored = read_object(STORED, "expected values of benchmarks.parity: restore the file")
    compare("from the CPU", packed, stored)
    compare("packed from full rows", packed, values("padded", "float32"))
    compare("bfloat16 from float32", values("shared_prefix", "bfloat16"), packed)
    return {**workload.environment(), "differences": found}


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    if args.store:
        set_up_jax("float32")
        write_json(STORED, values("shared_prefix", "float32"))
        return
    result = benchmark()
    workload.write_result(result, args.output)
    for name in ("from the CPU", "packed from full rows"):
        if max(result["differences"][name].values()) > TOLERANCE:
            raise InputError(
                f"{name}: found {result['differences'][name]}, expected up to {TOLERANCE}"
            )


if __name__ == "__main__":
    flags.DEFINE_bool("store", False, "write this device's values as those to compare with")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
