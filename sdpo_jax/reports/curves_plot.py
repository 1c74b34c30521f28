"""The plot of a run's curves; matplotlib is imported on use."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdpo_jax.evaluation import metrics
from sdpo_jax.runs.config import RunConfig
from sdpo_jax.system.files import whole_file

BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#777777"
Points = tuple[list[int], list[float]]


def series(lines: Sequence[dict[str, Any]], stage: str, key: str) -> Points:
    """Steps and values of a stage's lines that have `key`."""
    found = [line for line in lines if line["stage"] == stage and key in line]
    return [line["step"] for line in found], [line[key] for line in found]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, over fewer at the ends."""
    half = window // 2
    return [metrics.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw(lines: Sequence[dict[str, Any]], config: RunConfig, path: Path) -> None:
    """Plots `lines` of metrics.jsonl into a PNG, written atomically.

    Raises ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = [stage for stage in ("sft", "sdpo") if series(lines, stage, "loss")[0]]
    panels = [(_draw_loss, stage) for stage in stages]
    if "sdpo" in stages:
        panels += [(_draw_margin, "sdpo"), (_draw_accuracy, "sdpo")]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for (draw_panel, stage), axes in zip(panels, grid.flat, strict=False):
        draw_panel(axes, lines, stage, config)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("optimizer step")
        axes.legend(fontsize=8, facecolor="white", framealpha=0.9, edgecolor="none")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def _curves(axes, lines, stage: str, key: str) -> None:
    """Training values faint with their running mean, validation values as points."""
    steps, values = series(lines, stage, key)
    if steps:
        axes.plot(steps, values, color=BLUE, alpha=0.25, linewidth=0.8)
        window = max(3, len(values) // 15)
        axes.plot(steps, smoothed(values, window), color=BLUE, label="training")
    steps, values = series(lines, stage, f"validation/{key}")
    if steps:
        axes.plot(steps, values, "o-", color=ORANGE, markersize=4, label="validation")


def _draw_loss(axes, lines, stage: str, config: RunConfig) -> None:
    _curves(axes, lines, stage, "loss")
    axes.set_title(f"{'SFT' if stage == 'sft' else config.method} loss", fontsize=10)
    axes.set_ylabel("nats per answer" if stage == "sft" else "nats")
    if stage == "sdpo":
        among = config.num_negatives + 1 if config.objective == "sdpo" else 2
        label = f"log {among} = {math.log(among):.3f} (policy = reference)"
        axes.axhline(math.log(among), color=GREY, linestyle=":", label=label)


def _draw_margin(axes, lines, stage: str, config: RunConfig) -> None:
    _curves(axes, lines, stage, "rewards/margins")
    axes.axhline(0, color=GREY, linestyle=":", label="policy = reference")
    axes.set_title("Reward margin: preferred minus mean of dispreferred", fontsize=10)
    axes.set_ylabel("nats × beta")


def _draw_accuracy(axes, lines, stage: str, config: RunConfig) -> None:
    C = config.num_negatives + 1
    # At step 0 all rewards are equal, and a tie is not a success: a 0 would read as below chance.
    _curves(axes, [line for line in lines if line["step"] > 0], stage, "rewards/accuracies")
    axes.axhline(1 / C, color=GREY, linestyle=":", label=f"chance, 1/{C}")
    axes.set_ylim(0, 1)
    axes.set_title("Reward accuracy: preferred has the highest reward", fontsize=10)
    axes.set_ylabel("share of examples")
