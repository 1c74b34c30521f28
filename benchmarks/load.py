"""Host memory of the conversion and loading of a large checkpoint.

    python -m benchmarks.load --model=runs/quickstart/model --output=FILE.json

A Llama of random bfloat16 weights in several files is written into a temporary folder. Conversion
and loading are separate processes. The reported peak excludes the memory before, and is compared
with the size of the arrays and of the largest file.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from safetensors.numpy import save_file

from benchmarks import workload
from sdpo_jax.convert import convert
from sdpo_jax.models.config import DecoderConfig
from sdpo_jax.models.lora import LoraConfig
from sdpo_jax.models.store import load_model
from sdpo_jax.models.weights import TOKENIZER_FILES, abstract_base, slots
from sdpo_jax.system.command import run_command

LAYER = 103e6  # bytes of one layer of SIZES
SIZES = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def write_checkpoint(folder: Path, tokenizer: Path, gigabytes: float, files: int) -> int:
    """Writes a Hugging Face folder of about this size; returns the bytes of its largest file."""
    folder.mkdir()
    content = SIZES | {"num_hidden_layers": max(1, round(gigabytes * 1e9 / LAYER))}
    (folder / "config.json").write_text(json.dumps(content))
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder)
    config = DecoderConfig.from_hf(content, "synthetic")
    shapes, table = abstract_base(config), list(slots(config).items())
    rng, weight_map = np.random.default_rng(0), {}
    for i, part in enumerate(np.array_split(np.arange(len(table)), files)):
        tensors = {}
        for name, slot in (table[j] for j in part):
            shape = shapes[slot.path].shape[0 if slot.layer is None else 1 :]
            shape = shape[::-1] if slot.transposed else shape
            drawn = rng.standard_normal(shape, np.float32) * np.float32(0.02)
            tensors[name] = drawn.astype(ml_dtypes.bfloat16)
        file = f"model-{i + 1:05}-of-{files:05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most (getrusage includes the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(what: str, folder: Path) -> int:
    """Peak bytes of converting or loading, less the bytes of this process before."""
    before = resident("VmRSS")
    if what == "convert":
        convert(str(folder / "hf"), str(folder / "model"))
    else:
        load_model(folder / "model", LoraConfig(), dtype="bfloat16")
    return resident("VmHWM") - before


def benchmark(tokenizer: Path, gigabytes: float, files: int = 4) -> dict:
    """Per command: peak bytes, those beyond the arrays, and the latter per largest file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        largest = write_checkpoint(folder / "hf", tokenizer, gigabytes, files)
        arrays = sum(path.stat().st_size for path in (folder / "hf").glob("*.safetensors"))
        found = {"arrays_bytes": arrays, "largest_file_bytes": largest}
        for what in ("convert", "load"):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.load",
                    f"--here={what}",
                    f"--folder={folder}",
                    f"--model={tokenizer}",
                ],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_FLAGS": ""},
            )
            peak = int(done.stdout.split()[-1])
            beyond = peak - arrays
            found[what] = {
                "peak_bytes": peak,
                "beyond_arrays_bytes": beyond,
                "in_largest_files": beyond / largest,
            }
            print(
                f"{what:8} {arrays / 1e9:.2f} GB of arrays, peak {peak / 1e9:.2f} GB, excess "
                f"{beyond / largest:.2f} times the largest file",
                flush=True,
            )
    return found


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    if args.here:
        print(measure(args.here, Path(args.folder)))
        return
    found = benchmark(Path(args.model), args.gigabytes)
    workload.write_result({**workload.environment(), **found}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "folder written by sdpo_jax.convert, for its tokenizer", required=True
    )
    flags.DEFINE_float("gigabytes", 2.0, "approximate size of the checkpoint", lower_bound=0.1)
    flags.DEFINE_enum("here", None, ["convert", "load"], "measure only this, in this process")
    flags.DEFINE_string("folder", None, "for --here: the one with the checkpoint")
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
