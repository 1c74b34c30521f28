"""Whether a run that was killed and resumed ends with the same bits as one that was not.

python -m benchmarks.resume --model=MODEL --dataset=DATA --work=FOLDER --output=FILE.json
"""

import hashlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import workload
from sdpo_jax.runs.curves import read_metrics
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError

STEPS, SAVED = 6, 2  # of SFT, and steps between two checkpoints


def train(model: str, dataset: str, run: Path) -> list[str]:
    """The command of the run."""
    return [
        *(sys.executable, "-m", "sdpo_jax.train", "--config=configs/quickstart.py:smoke"),
        *(f"--workdir={run}", f"--config.model={model}", f"--config.dataset={dataset}"),
        *("--config.stages=('sft',)", f"--config.sft.max_steps={STEPS}"),
        *(f"--config.checkpoint_every={SAVED}", f"--config.eval_every={STEPS}"),
    ]


def checked(command: Sequence[str]) -> None:
    """Runs a command. Raises InputError if it fails."""
    if status := subprocess.run(command, check=False).returncode:
        raise InputError(f"{' '.join(command[1:])}: found exit status {status}, expected 0")


def kill_after(command: Sequence[str], run: Path, steps: int) -> int:
    """Starts a training and kills it once its curves have a step above `steps`; that step."""
    process = subprocess.Popen(command)
    while process.poll() is None:
        done = max((line["step"] for line in read_metrics(run / "metrics")), default=0)
        if done > steps:
            process.kill()
            process.wait()
            return done
        time.sleep(0.05)
    raise InputError(f"{run}: the run ended before it could be killed: remove the folder")


def adapter(run: Path) -> str:
    """SHA-256 of the exported adapter."""
    output = run.with_name(f"{run.name}-adapter")
    flags_ = (f"--workdir={run}", "--stage=sft", "--format=peft", f"--output={output}")
    checked([sys.executable, "-m", "sdpo_jax.export", *flags_])
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    work = Path(args.work)
    whole, killed = work / "whole", work / "killed"
    checked(train(args.model, args.dataset, whole))
    command = train(args.model, args.dataset, killed)
    at = kill_after(command, killed, SAVED)
    checked(command)
    equal = adapter(whole) == adapter(killed)
    print(f"killed after step {at} of {STEPS}; the adapters are {'' if equal else 'NOT '}equal")
    workload.write_result({"killed_after": at, "steps": STEPS, "bit_equal": equal}, args.output)
    if not equal:
        raise InputError(f"{killed}: found another adapter than in {whole}, expected equal bits")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_string("work", None, "folder of the runs, made anew", required=True)
    flags.DEFINE_string("output", "", "JSON file; default: printed")
    run_command(main)
