"""The curves of a run: metrics.jsonl and TensorBoard events, under TRL's names."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdpo_jax.system.files import COUNT, TEXT, read_json_lines, whole_file


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that a killed run left unfinished.

    Raises InputError naming a line that training did not write.
    """
    path = Path(folder) / "metrics.jsonl"
    if not os.path.lexists(path):
        return []
    kinds = {"stage": TEXT, "step": COUNT}
    return read_json_lines(
        path, kinds, "expected what training wrote", "remove the line", unfinished=True
    )


class MetricsWriter:
    """Appends to metrics.jsonl and TensorBoard.

    Args:
      folder: workdir/metrics.
      stage: prefix of the TensorBoard names and key of the lines.
      step: the step that the stage resumes from; later lines of the stage are dropped, since they
        will be written again.
    """

    def __init__(self, folder: Path, stage: str, step: int):
        from tensorboardX import SummaryWriter  # slow to load, and readers do not need it

        folder.mkdir(parents=True, exist_ok=True)
        self._stage = stage
        self._path = folder / "metrics.jsonl"
        kept = [m for m in read_metrics(folder) if m["stage"] != stage or m["step"] <= step]
        with whole_file(self._path) as partial:
            partial.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")
        self._board = SummaryWriter(str(folder / stage), purge_step=step + 1)

    def write(self, step: int, examples: int, values: Mapping[str, float]) -> None:
        line = {"stage": self._stage, "step": step, "examples": examples, "time": time.time()}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line | {k: round(float(v), 6) for k, v in values.items()}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{self._stage}/{name}", value, step)

    def close(self) -> None:
        self._board.close()
