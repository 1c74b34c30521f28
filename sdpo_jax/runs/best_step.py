"""The best checkpoint of a stage, by its validation loss or by the hits that a separate job counts.

With `config.best_by` naming a decoder, the hits of

    python -m sdpo_jax.evaluate --workdir=DIR --follow --split=<validation_split> --decoder=<it>

decide. Checkpoints are retained until the job has evaluated them.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 2.0


def hit_ratios(workdir: Path, stage: str, decoder: str, split: str) -> dict[int, float]:
    """Step -> HR@1 among the candidates, of a stage's evaluations on `split` so far."""
    expected = {"split": split, "decoder": decoder, "rank": "candidates"}
    found = {}
    for path in Path(workdir, "eval").glob(f"{stage}-*-{decoder}*.json"):
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            if all(summary[key] == value for key, value in expected.items()):
                found[summary["step"]] = summary["hit_ratio_at_1"]
        except (OSError, ValueError, KeyError):  # being moved: the next call finds it
            continue
    return found


def best_of(scores: Mapping[int, float]) -> int:
    """The step with the highest score, the first of equals."""
    return max(sorted(scores), key=scores.__getitem__)


class KeepForEvaluator:
    """Orbax preservation policy: steps not evaluated yet, and the best of the others."""

    def __init__(self, evaluated: Callable[[], Mapping[int, float]]):
        self._evaluated = evaluated

    def should_preserve(self, checkpoints: Sequence, *, context) -> list[bool]:
        scores = {
            step: score
            for step, score in self._evaluated().items()
            if step in {checkpoint.step for checkpoint in checkpoints}
        }
        best = best_of(scores) if scores else None
        return [c.step not in scores or c.step == best for c in checkpoints]


def wait_for_evaluator(
    evaluated: Callable[[], Mapping[int, float]], steps: Sequence[int], ask: Callable[[], None]
) -> None:
    """Returns when all `steps` are evaluated; calls `ask` meanwhile, which may raise."""
    while set(steps) - set(evaluated()):
        ask()
        time.sleep(POLL_SECONDS)
