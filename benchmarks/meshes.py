"""Memory and communication of a Llama2-7B-shaped step per device of a mesh.

    python -m benchmarks.meshes --devices=8,64,256 --output=FILE.json

The step is compiled on abstract arrays for simulated devices; nothing is run. A collective is
counted once per iteration of the loops around it; its bytes are those of its result on one device.
"""

import collections
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from benchmarks import hlo, workload
from benchmarks.memory import LLAMA2_7B
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.decoder import REMAT
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.system import sharding
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.training.step_memory import lower_step, memory_of

# Number of devices -> shapes (data, fsdp, tensor).
MESHES = {
    4: ((4, 1, 1), (1, 4, 1)),
    8: ((8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 4, 2), (1, 2, 4)),
    64: ((1, 64, 1), (8, 8, 1), (4, 8, 2)),
    256: ((1, 256, 1), (32, 8, 1), (16, 8, 2)),
}
SIZES = {
    "7b": (LLAMA2_7B, workload.PROMPT),
    "70b": (DecoderConfig(V=32000, L=80, D=8192, N=64, G=8, H=128, F=28672), workload.PROMPT),
    "toy": (DecoderConfig(V=96, L=3, D=64, N=8, G=8, H=8, F=96), 12),
}


def compile_mesh(shape: Sequence[int], size: str, microbatch: int, remat: str) -> dict:
    """One row: bytes per device, and collectives by kind, in the loop over layers and outside."""
    config, prompt = SIZES[size]
    mesh = sharding.make_mesh(*shape)
    examples = workload.equal_examples(microbatch * sharding.data_shards(mesh), 3, prompt)
    lowered = lower_step(
        config,
        LoraConfig(),
        examples,
        dtype="bfloat16",
        remat=remat,
        layout="shared_prefix",
        mesh=mesh,
    )
    started = time.perf_counter()
    compiled = lowered.step.compile()
    seconds = time.perf_counter() - started
    found: dict[str, dict] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for one in hlo.collectives(hlo.parse(compiled.as_text())):
        key = f"{one['kind']} {'in the layers' if one['depth'] else 'once'}"
        found[key]["count"] += one["turns"]
        found[key]["bytes"] += one["turns"] * one["bytes"]
    memory = memory_of(lowered, compiled, seconds)
    return {
        "mesh": list(shape),
        "microbatch": microbatch,
        "remat": remat,
        "total": memory.total,
        "base": memory.base,
        "temporary": memory.temporary,
        "compile_seconds": seconds,
        "collectives": dict(found),
    }


def on_devices(count: int, size: str, microbatch: int, remat: str) -> list[dict]:
    """Rows of all meshes of `count` devices, from a process with so many simulated devices."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.meshes",
            f"--devices={count}",
            f"--size={size}",
            f"--microbatch={microbatch}",
            f"--remat={remat}",
            f"--output={output}",
            "--here",
        ]
        settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
        done = subprocess.run(command, env=os.environ | settings, check=False)
        if done.returncode:
            raise InputError(
                f"--devices={count}: found exit status {done.returncode}, expected 0: see its "
                "output above"
            )
        return workload.read_result(output)["rows"]


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    jax.config.update("jax_enable_compilation_cache", False)
    known = {str(count): count for count in MESHES}
    if unknown := [count for count in args.devices if count not in known]:
        raise InputError(f"--devices: found {unknown[0]}, expected some of {', '.join(known)}")
    rows = []
    for count in map(known.__getitem__, args.devices):
        if not args.here:
            rows += on_devices(count, args.size, args.microbatch, args.remat)
            continue
        for shape in MESHES[count]:
            row = compile_mesh(shape, args.size, args.microbatch, args.remat)
            rows.append(row)
            gib = {key: f"{row[key] / 2**30:.2f}" for key in ("base", "temporary", "total")}
            print(f"mesh {shape}, GiB per device: {gib}", flush=True)
            for name, sums in sorted(row["collectives"].items()):
                mib = sums["bytes"] / 2**20
                print(f"    {name:36} {sums['count']:5}  {mib:10.1f} MiB", flush=True)
    workload.write_result({**workload.environment(), "rows": rows}, args.output)


if __name__ == "__main__":
    flags.DEFINE_list("devices", ["8", "64", "256"], "numbers of devices: 4, 8, 64 or 256")
    flags.DEFINE_enum("size", "7b", list(SIZES), "shape of the model")
    flags.DEFINE_integer("microbatch", 4, "examples per device", lower_bound=1)
    flags.DEFINE_enum("remat", "full", list(REMAT), "recomputation in the backward pass")
    flags.DEFINE_bool("here", False, "compile in this process, which has the devices")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
