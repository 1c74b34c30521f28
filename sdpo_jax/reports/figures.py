"""Figures as SVG elements of a page; matplotlib is imported on use."""

import io
from collections.abc import Callable, Sequence

from sdpo_jax.reports.curves_plot import BLUE, GREY, ORANGE, Points, smoothed

COLOURS = (ORANGE, BLUE, GREY, "#1b7837", "#762a83")
Interval = tuple[float, float, float]  # a value and the ends of its interval


def bars(name: str, labels: Sequence[str], values: Sequence[Interval], unit: str) -> str:
    """One bar per label, with its interval."""

    def fill(axes) -> None:
        heights, errors = _errors(values)
        axes.bar(labels, heights, yerr=errors, capsize=4, color=BLUE, ecolor=GREY, width=0.6)
        axes.set_ylabel(unit)

    return _svg(name, fill)


def over(name: str, at: Sequence[float], values: Sequence[Interval], axis: str, unit: str) -> str:
    """Values with intervals over a setting, whose values are evenly spaced."""

    def fill(axes) -> None:
        heights, errors = _errors(values)
        axes.errorbar(
            range(len(at)), heights, yerr=errors, fmt="o-", capsize=4, color=BLUE, ecolor=GREY
        )
        axes.set_xticks(range(len(at)), [f"{value:g}" for value in at])
        axes.set_xlabel(axis)
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)

    return _svg(name, fill)


def curves(name: str, lines: Sequence[tuple[str, Points]], unit: str) -> str:
    """One line per label over steps; many points are drawn faint under their running mean."""

    def fill(axes) -> None:
        for (label, (steps, values)), colour in zip(lines, COLOURS, strict=False):
            window = max(1, len(values) // 15)
            if window > 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smoothed(values, window), color=colour, label=label)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(unit)
        axes.legend(fontsize=8, framealpha=0.9, edgecolor="none")

    return _svg(name, fill)


def _errors(values: Sequence[Interval]) -> tuple[list[float], list[list[float]]]:
    """Heights, and the lengths of the intervals below and above."""
    heights = [value for value, _, _ in values]
    below = [max(0.0, value - low) for value, low, _ in values]
    above = [max(0.0, high - value) for value, _, high in values]
    return heights, [below, above]


def _svg(name: str, fill: Callable) -> str:
    """The <svg> element alone. `name` makes its ids unique on the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    fill(axes)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :].strip()
