"""Steps and decoders compiled for TPUs and GPUs that are not here, by XLA's own compilers.

    make aot        # or: python -m benchmarks.aot --output=benchmarks/results/aot.json

Each program is compiled in a process of its own, on abstract arrays. What is read from it: bytes
per device, collectives, the TPU compiler's estimated cycles, and for GPUs a roofline model of every
kernel. None of it is a measurement. A program whose text and compiler are as before is not compiled
again: `--cache` keeps what the compiler gave. Products on GPUs are compiled in cuBLAS's form.
"""

import concurrent.futures
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from benchmarks import hlo, workload
from benchmarks.memory import LLAMA2_7B
from benchmarks.tables import GIB, markdown
from sdpo_jax.data import loader
from sdpo_jax.data.tokens import Example
from sdpo_jax.evaluation import catalogue, decode, title_trie
from sdpo_jax.evaluation.beam import beam_search
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.system import sharding
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError
from sdpo_jax.system.files import read_object, write_json
from sdpo_jax.system.topologies import GPUS, open_topology
from sdpo_jax.training import device_stats
from sdpo_jax.training.step_memory import abstract_model, lower_step, memory_of

SMOLLM2 = DecoderConfig(V=49152, L=30, D=576, N=9, G=3, H=64, F=1536, tied=True)
# V: no multiple of D or F, for whose arrays its own would be taken.
TOY = DecoderConfig(V=2000, L=2, D=128, N=4, G=2, H=32, F=256)
# Model, tokens of a prompt among candidates, of a title.
SIZES = {"7b": (LLAMA2_7B, 300, 9), "smollm2": (SMOLLM2, 196, 6), "toy": (TOY, 20, 4)}
TARGETS = 60  # of a history
ITEMS = 1682  # of the catalogue
NEW_TOKENS, BEAMS = 20, 20
# A device measures which of XLA's two forms of a product is faster; here one must be chosen.
CUBLAS = "--xla_gpu_enable_triton_gemm=false"
TPU_CLOCK = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
# Shares of the peaks that kernels usually reach.
BANDWIDTH_SHARE, FLOPS_SHARE = 0.8, 0.65


@dataclasses.dataclass(frozen=True)
class Case:
    """One program. `program`: step, score, greedy, trie or beam; `batch`: examples per shard."""

    topology: str
    size: str = "7b"
    program: str = "step"
    prompt: str = "candidates"
    k: int = 3
    base_dtype: str = "same"
    remat: str = "full"
    batch: int = 4
    dropout: float = 0.1
    fsdp: int = 1
    tensor: int = 1

    @property
    def name(self) -> str:
        """The values that differ from the defaults."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name != "topology" and getattr(self, field.name) != field.default
        ]
        return " ".join([self.topology, *changed])


def cases() -> list[Case]:
    gpu, small = Case("h100"), Case("h100", "smollm2", prompt="history", batch=8, remat="cheap")
    change = dataclasses.replace
    cheap = change(gpu, remat="cheap", batch=16)
    found = [gpu, change(gpu, batch=16), cheap]
    found += [change(cheap, k=k) for k in (0, 15)]
    found += [change(cheap, base_dtype=kind) for kind in ("int8", "nf4")]
    found += [change(cheap, batch=32), change(cheap, dropout=0.0)]
    found += [change(gpu, prompt="history", batch=4, remat="cheap", k=k) for k in (0, 3)]
    found += [small, change(small, k=0), change(small, k=15, batch=4)]
    found += [change(gpu, program=name, batch=32) for name in ("score", "greedy", "trie")]
    found += [change(gpu, program="beam", prompt="history", batch=8)]
    found += [change(gpu, topology="8xh100", fsdp=8), change(gpu, topology="8xh100", fsdp=4)]
    found[-1] = change(found[-1], tensor=2)
    v6e = Case("v6e:1x1")
    found += [v6e, change(v6e, k=15), *(change(v6e, base_dtype=kind) for kind in ("int8", "nf4"))]
    found += [Case("v5p:1x1x1", k=15, remat="cheap"), Case("v5e:1x1")]
    found += [Case("v5e:4x4", fsdp=16), Case("v5e:4x4", fsdp=8, tensor=2)]
    found += [change(small, topology="v5e:1x1", k=k) for k in (0, 3)]
    found += [change(v6e, size="smollm2", program=name, batch=32) for name in ("score", "trie")]
    found += [change(v6e, size="smollm2", program="beam", prompt="history", batch=8)]
    return found


def toy_cases(topology: str) -> list[Case]:
    """Small programs with every kind of base, for tests."""
    fsdp, tensor = (2, 2) if topology in ("v5e:2x2", "4xh100") else (1, 1)
    toy = Case(topology, "toy", batch=2, fsdp=fsdp, tensor=tensor)
    return [dataclasses.replace(toy, base_dtype=kind) for kind in ("same", "int8", "nf4")]


def examples_of(case: Case, count: int) -> list[Example]:
    """Examples of the size's lengths; their token ids do not matter."""
    _, prompt, title = SIZES[case.size]
    answers = (np.ones(title, np.int32),) * (case.k + 1)
    if case.prompt == "candidates":
        return [Example.single(np.ones(prompt, np.int32), answers)] * count
    head = 10
    places = tuple(head + title * i - 1 for i in range(TARGETS))
    tokens = np.ones(head + title * TARGETS - 1, np.int32)  # no target follows the last title's end
    return [Example(tokens, places, (answers,) * TARGETS, continued=True)] * count


def lower(case: Case) -> tuple[Any, Callable[[Any], dict]]:
    """The lowered program, and a function from the compiled one to its bytes per device."""
    topology = open_topology(case.topology)
    data = len(topology.devices) // (case.fsdp * case.tensor)
    mesh = sharding.make_mesh(data, case.fsdp, case.tensor, devices=topology.devices)
    config, shards = SIZES[case.size][0], sharding.data_shards(mesh)
    examples = examples_of(case, case.batch * shards)
    lora = LoraConfig(dropout=case.dropout)
    if case.program == "step":
        made = lower_step(
            config,
            lora,
            examples,
            dtype="bfloat16",
            base_dtype=case.base_dtype,
            remat=case.remat,
            layout="shared_prefix",
            mesh=mesh,
        )

        def bytes_of(compiled) -> dict:
            found = memory_of(made, compiled, 0)
            fixed = found.base + found.state + found.batch
            return {"fixed": fixed, "temporary": found.temporary}

        return made.step, bytes_of
    return _lower_decoder(case, config, lora, examples, mesh)


def _lower_decoder(case: Case, config: DecoderConfig, lora: LoraConfig, examples, mesh):
    graphdef, adapter, base = abstract_model(
        config, lora, "bfloat16", "none", mesh, case.base_dtype
    )
    if case.prompt == "history":  # whose last title alone is ranked
        examples = [Example.single(e.prompt, e.answers_MC[0]) for e in examples]
    rows = sharding.data_shards(mesh)
    batch: Any = loader.collate(examples, loader.choose_shapes([examples], rows)[0], rows)
    placed, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    batch = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for k, x in batch.items()}
    titles = None
    if case.program == "beam":
        titles = _titles(SIZES[case.size][2], whole)
        batch["allowed_BY"] = jax.ShapeDtypeStruct((len(examples), ITEMS), bool, sharding=placed)

    def run(adapter, base, batch, titles):
        decoder = nnx.merge(graphdef, adapter, base)
        prefix = decode.prefill(decoder, batch)
        if case.program == "greedy":
            return decode.greedy(decoder, prefix, (1,), NEW_TOKENS)
        if case.program == "trie":
            return decode.trie(decoder, prefix, batch["answers_BMCA"][:, 0])
        if case.program == "beam":
            return beam_search(decoder, prefix, titles, batch["allowed_BY"], BEAMS)
        return decode.score(decoder, prefix, batch)

    def bytes_of(compiled) -> dict:
        found = compiled.memory_analysis()
        return {"fixed": found.argument_size_in_bytes, "temporary": found.temp_size_in_bytes}

    return jax.jit(run).lower(adapter, base, batch, titles), bytes_of


def _titles(length: int, whole) -> Any:
    """A catalogue of random titles as abstract arrays."""
    drawn = np.random.default_rng(0).integers(2, 200, (ITEMS, length - 1))
    ends = np.ones((ITEMS, 1), np.int32)
    answers = [tuple(map(int, row)) for row in np.concatenate([drawn, ends], 1)]
    trie = title_trie.build(answers)
    made = catalogue.to_devices(trie, title_trie.pieces(trie), jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), made)


def compile_case(case: Case, cache: Path) -> dict:
    """The row of a case; compiled only where `cache` has no program of the same text."""
    lowered, bytes_of = lower(case)
    version = importlib.metadata.version("jaxlib")
    parts = [version, os.environ.get("XLA_FLAGS", ""), case.name, lowered.as_text()]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    facts, program = cache / f"{key}.json", cache / f"{key}.hlo.gz"
    if not facts.exists():
        started = time.perf_counter()
        compiled = lowered.compile()
        seconds = time.perf_counter() - started
        cache.mkdir(parents=True, exist_ok=True)
        program.write_bytes(gzip.compress(compiled.as_text().encode()))
        write_json(facts, {**bytes_of(compiled), "compile_seconds": seconds})
    return {
        "case": dataclasses.asdict(case),
        "name": case.name,
        **read_object(facts, "expected a result of benchmarks.aot: remove it"),
        **read_program(case, hlo.parse(gzip.decompress(program.read_bytes()).decode())),
    }


def read_program(case: Case, program: hlo.Program) -> dict:
    """What the compiled text says: collectives, gathers, weight copies, modelled seconds."""
    config = SIZES[case.size][0]
    device = open_topology(case.topology).devices[0]
    moved = hlo.collectives(program)
    slices, wider = hlo.weight_copies(program, frozenset({config.D, config.F}))
    found = {
        "collective_bytes": sum(x["bytes"] * x["turns"] for x in moved),
        "big_gathers": hlo.big_gathers(program, config.D * config.F // 2),
        "wide_float32": len(hlo.wide_float32_products(program, config.F)),
        "weight_slices": slices,
        "weight_copies": wider,
    }
    kind = device.device_kind
    if cycles := hlo.estimated_cycles(program):
        clock = next(hz for name, hz in TPU_CLOCK.items() if kind.startswith(name))
        return found | {"cycles": cycles, "seconds": cycles / clock}
    bandwidth = next((gpu.bandwidth for gpu in GPUS.values() if gpu.name == kind), None)
    peak = device_stats.peak_flops(device, "bfloat16")
    if bandwidth is None or peak is None:
        return found
    parts = hlo.modelled_seconds(
        program, hlo.Roofline(BANDWIDTH_SHARE * bandwidth, FLOPS_SHARE * peak)
    )
    return found | {"seconds": sum(parts.values()), "seconds_by_kind": parts}


def in_own_process(case: Case, cache: Path, limit: float) -> dict:
    """The row of a case, compiled in a process that is killed after `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.aot", f"--cache={cache}"]
    command.append(f"--here={json.dumps(dataclasses.asdict(case))}")
    flags_ = f"{os.environ.get('XLA_FLAGS', '')} {CUBLAS}".strip()
    environment = os.environ | ({"XLA_FLAGS": flags_} if "100" in case.topology else {})
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": case.name, "error": f"not compiled in {limit:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        said = [line for line in lines if "Error" in line or "RESOURCE" in line] or lines
        return {"name": case.name, "error": said[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: Sequence[dict]) -> str:
    """The table of docs/devices.md."""
    header = ["program", "fixed, GiB", "temporary, GiB", "total, GiB", "collectives, GiB"]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["name"], f"not compiled: {row['error']}", "", "", "", ""])
            continue
        sizes = (row["fixed"], row["temporary"], row["fixed"] + row["temporary"])
        lines.append(
            [
                row["name"],
                *(f"{size / GIB:.2f}" for size in sizes),
                f"{row['collective_bytes'] / GIB:.1f}" if row["collective_bytes"] else "–",
                f"{1000 * row['seconds']:.0f}" if "seconds" in row else "–",
            ]
        )
    return markdown([*header, "modelled ms"], lines)


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    jax.config.update("jax_enable_compilation_cache", False)
    cache = Path(args.cache)
    if args.here:
        print(json.dumps(compile_case(Case(**json.loads(args.here)), cache)))
        return
    todo = [case for case in cases() if args.only in case.name]
    if not todo:
        raise InputError(f"--only: found {args.only}, expected a part of a program's name")
    rows: list[dict] = []
    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        for row in pool.map(lambda case: in_own_process(case, cache, args.limit), todo):
            rows.append(row)
            print(f"{row['name']}: {row.get('error', 'compiled')}", flush=True)
    print(table(rows))
    workload.write_result({"rows": rows}, args.output)
    if failed := [row["name"] for row in rows if "error" in row]:
        raise InputError(f"not compiled: {'; '.join(failed)}: the same command tries them again")


if __name__ == "__main__":
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    flags.DEFINE_string("cache", "runs/aot", "folder of compiled programs' texts")
    flags.DEFINE_string("only", "", "compile the programs whose name contains this")
    flags.DEFINE_integer("processes", 2, "programs compiled at once", lower_bound=1)
    flags.DEFINE_float("limit", 900, "seconds for one program")
    flags.DEFINE_string("here", "", "compile this one in this process: used by the program itself")
    run_command(main)
