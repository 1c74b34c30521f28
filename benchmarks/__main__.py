"""All benchmarks of this machine, written to benchmarks/results/<device>.json.

    python -m benchmarks --model=runs/quickstart/model --dataset=runs/quickstart/data

`make bench` runs this, in an hour and a quarter on two cores; docs/speed.md has tables of the file.
Each part is a separate process, which has the memory to itself. It is written to the file when it
is done; the same command runs only the missing parts. Run nothing else on the machine.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from benchmarks import workload
from benchmarks.tables import STEP
from sdpo_jax.system.command import run_command
from sdpo_jax.system.errors import InputError

SIDES = "official,strong,ours"
SIDES_OF_PAIRS = "official,strong,trl,trl-best,ours"
KS = (3, 8, 15, 1, 5, 0)


def parts(dataset: str, others: Sequence[str], repeats: int) -> dict[str, list[str]]:
    """Name in the file -> module and flags."""

    def step(k: int, sides: str, data: str = dataset) -> list[str]:
        return ["step", f"--dataset={data}", f"--k={k}", f"--sides={sides}", f"--repeats={repeats}"]

    here = f"--dataset={dataset}"
    found = {f"{STEP}{k}": step(k, SIDES_OF_PAIRS if k == 1 else SIDES) for k in KS}
    found["score"] = ["score", here, f"--repeats={repeats}"]
    found["memory"] = ["memory", here]
    found["load"] = ["load"]
    found["quantized"] = ["quantized", here]
    found["start"] = ["start", here]
    found["activations kept"] = step(3, "official-keep,ours")
    for data in (dataset, *others):
        found[f"loader {data}"] = ["loader", f"--dataset={data}"]
    for data in others:
        found[f"step on {data}"] = step(3, SIDES, data)
    return found


def measure(part: Sequence[str], model: str) -> dict:
    """The result of one benchmark, run in a separate process. Raises InputError if it fails."""
    module, *arguments = part
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{module}", f"--model={model}", *arguments]
        done = subprocess.run([*command, f"--output={output}"], check=False)
        if done.returncode:
            raise InputError(
                f"benchmarks.{module} {' '.join(arguments)}: found exit status {done.returncode}, "
                "expected 0: see its output above"
            )
        return workload.read_result(output)


def main(argv: Sequence[str]) -> None:
    args = flags.FLAGS
    file = workload.result_file()
    result = workload.read_result(file) if file.exists() else {}
    failed = []
    for name, part in parts(args.dataset, args.others, args.repeats).items():
        if name in result:
            print(f"{name}: already in {file}; remove it there to measure it again")
            continue
        print(f"\n{name}", flush=True)
        try:
            result[name] = measure(part, args.model)
        except InputError as error:
            failed.append(f"{name} ({error})")
            continue
        workload.write_result(result, str(file))
    print(f"written to {file}; next: python -m benchmarks.tables --result={file}")
    if failed:
        raise InputError(f"not measured: {'; '.join(failed)}: the same command tries them again")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "folder written by sdpo_jax.convert", required=True)
    flags.DEFINE_string("dataset", None, "folder written by sdpo_jax.prepare", required=True)
    flags.DEFINE_list("others", [], "more folders of sdpo_jax.prepare: loader, step at K = 3")
    flags.DEFINE_integer("repeats", 5, "timed steps per side", lower_bound=1)
    run_command(main)
