"""Memory of a step, from compiling it on abstract arrays: without weights and without running it.

    python -m benchmarks.memory --model=runs/quickstart/model --dataset=runs/quickstart/data \
        --output=FILE.json

Two tables: temporaries of the step on real prompts and of the official recipe's step written in
JAX, with and without recomputation; and the memory of Llama2-7B by microbatch.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import workload
from sdpo_jax.data.tokens import Example
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import REMAT, Decoder
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.objectives.logprobs import Batch, padded_hidden, shared_prefix_logp
from sdpo_jax.objectives.losses import sdpo_loss
from sdpo_jax.system import sharding
from sdpo_jax.system.command import run_command
from sdpo_jax.system.processes import set_up_jax
from sdpo_jax.system.topologies import open_topology
from sdpo_jax.training.step_memory import abstract_batch, abstract_model, step_memory

LLAMA2_7B = DecoderConfig(V=32000, L=32, D=4096, N=32, G=32, H=128, F=11008)

# dtype of the stored base, recomputation in the backward pass
KEPT = (
    ("bf16", "least"),
    ("bf16", "full"),
    ("bf16", "cheap"),
    ("int8", "full"),
    ("nf4", "full"),
    ("nf4", "least"),
)


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(devices=jax.devices()[:1])


def official_logp(decoder: Decoder, batch: Batch) -> jax.Array:
    """`logp_BMC` as the official code computes it: float32 logits at every position of a row."""
    hidden_ZTD, answers_ZA, mask_ZA = padded_hidden(decoder, batch)
    A = answers_ZA.shape[1]
    logp_ZTV = jax.nn.log_softmax(decoder.logits(hidden_ZTD))
    logp_ZA = jnp.take_along_axis(logp_ZTV[:, -A:], answers_ZA[..., None], -1)[..., 0]
    return jnp.where(mask_ZA, logp_ZA, 0.0).sum(-1).reshape(batch["answers_BMCA"].shape[:3])


def temporaries(config: DecoderConfig, examples: Sequence[Example], remat: str, official: bool):
    """Temporary bytes of the loss and its gradient, float32.

    The official step runs K+1 full rows and the reference; ours reads the reference's log-probs
    from the batch.
    """
    mesh = one_device()
    graphdef, lora, base = abstract_model(config, LoraConfig(), jnp.float32, remat, mesh)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), abstract_batch(examples, mesh)
    )

    def loss(lora, reference, base, batch):
        decoder, reference_BMC = nnx.merge(graphdef, lora, base), batch["reference_logp_BMC"]
        if not official:
            return sdpo_loss(shared_prefix_logp(decoder, batch), reference_BMC, 1.0).mean()
        reference_BMC = official_logp(nnx.merge(graphdef, reference, base), batch)
        reference_BMC = jax.lax.stop_gradient(reference_BMC)
        return sdpo_loss(official_logp(decoder, batch), reference_BMC, 1.0).mean()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(lora, lora, base, batch)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def beside_official(config: DecoderConfig, examples: Sequence[Example]) -> dict:
    """Per remat of ours: temporary bytes of both, and their ratio; the official has two remats."""
    found = {}
    for remat in REMAT:
        ours = temporaries(config, examples, remat, official=False)
        theirs = temporaries(config, examples, "none" if remat == "none" else "full", official=True)
        found[remat] = {"official": theirs, "ours": ours, "ratio": theirs / ours}
        print(
            f"remat {remat:6} official {theirs / 2**20:8.0f} MiB  ours {ours / 2**20:8.0f} MiB  "
            f"{theirs / ours:5.1f}x",
            flush=True,
        )
    return found


def llama_table(
    config: DecoderConfig,
    negatives: Sequence[int],
    microbatches: Sequence[int],
    mesh: jax.sharding.Mesh | None = None,
):
    """Rows of the memory table: one device, that of `mesh` if given, bfloat16 products."""
    rows = []
    mesh = mesh or one_device()
    for (base, remat), k, microbatch in itertools.product(KEPT, negatives, microbatches):
        examples = workload.equal_examples(microbatch, k)
        found = step_memory(
            config,
            LoraConfig(),
            examples,
            dtype="bfloat16",
            base_dtype=base,
            remat=remat,
            layout="shared_prefix",
            mesh=mesh,
        )
        row = {"base_dtype": base, "remat": remat, "k": k, "microbatch": microbatch}
        rows.append(row | {"total": found.total} | dataclasses.asdict(found))
        print(
            f"base {base:5} remat {remat:6} K={k:<3} microbatch {microbatch:<3} "
            f"{found.total / 2**30:6.1f} GiB (temporary {found.temporary / 2**30:.1f}), "
            f"compiled in {found.compile_seconds:.0f} s",
            flush=True,
        )
    return rows


def benchmark(model: Path, dataset: Path, topology: str = "") -> dict:
    """Both tables as `main` writes them."""
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are reported
    mesh = None
    if topology:  # before JAX looks for devices
        mesh = sharding.make_mesh(devices=open_topology(topology).devices[:1])
    examples = workload.read_workload(model, dataset).examples(4, 3)
    config = DecoderConfig.read(model)
    return {
        **workload.environment(),
        "beside_official": beside_official(config, examples),
        "llama2_7b": llama_table(LLAMA2_7B, (3, 15), (1, 2, 4, 8, 16, 32), mesh),
    }


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    set_up_jax("float32")
    result = benchmark(Path(args.model), Path(args.dataset), args.topology)
    workload.write_result(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_string("topology", "", "device of the second table, such as h100; default: a CPU")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
