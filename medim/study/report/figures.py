"""Figures of the study page: an arm compared with from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator

from medim.metrics.calibration import Calibration
from medim.reports.figures import label_counts, wilson_interval
from medim.reports.svg import (
    FIVE,
    FOUR,
    INK,
    LARGE_WIDTH,
    ONE,
    SOFT,
    THREE,
    TWO,
    WIDTH,
    Figure,
    draw_legend,
    open_canvas,
    render_svg,
)
from medim.study.report.format import format_estimate
from medim.study.statistics.intervals import ConfidenceInterval

IntervalPoints = Sequence[tuple[float, ConfidenceInterval]]  # labels or steps, and the measured interval
SCRATCH_STYLE: Any = (TWO, "D", (0, (5, 2)))
ARM_COLOURS = (ONE, THREE, FOUR, FIVE, INK)
ARM_MARKERS = "os^vPX"
ARM_DASHES: Any = ("-", (0, (1, 1.5)), (0, (6, 1.5, 1, 1.5)))
LEGEND_WIDTH = {WIDTH: 50, LARGE_WIDTH: 78}  # characters per row of the legend, by width of the drawing


def plot_curves(
    lines: Mapping[str, IntervalPoints],
    unit: str,
    metric: str,
    caption: str,
    *,
    log: bool = False,
    level: float | None = None,
) -> Figure:
    """Plot a metric over labels or steps, for one or more arms and from scratch with their intervals.

    More than two lines have bars beside each other instead of bands, in a larger figure.

    Args:
        lines: name to points, from scratch last.
        unit: unit of the horizontal axis.
        metric: label of the vertical axis.
        caption: caption of the figure.
        log: whether the horizontal axis is logarithmic, with a tick at each point.
        level: final level of from scratch, drawn as a horizontal line.
    """
    is_large = len(lines) > 2
    with open_canvas(3.9 if is_large else 2.9, LARGE_WIDTH if is_large else WIDTH) as (canvas, axes):
        positions = spread_positions({name: [x for x, _ in points] for name, points in lines.items()}, log=log)
        styles = [*(arm_style(number) for number in range(len(lines) - 1)), SCRATCH_STYLE]
        for (name, points), (colour, marker, dashes) in zip(lines.items(), styles, strict=True):
            x, y = positions[name], [estimate.value for _, estimate in points]
            bounds = [estimate.low for _, estimate in points], [estimate.high for _, estimate in points]
            if not is_large:
                axes.fill_between(x, *bounds, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(x, *bounds, color=colour, linewidth=1.6, alpha=0.55)
            axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1.8, label=name)
        if level is not None:
            axes.axhline(level, color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)))
        if log:
            ticks = sorted({position for points in lines.values() for position, _ in points})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit)
        axes.set_ylabel(metric)
        draw_legend(axes, _count_legend_columns(lines, LARGE_WIDTH if is_large else WIDTH))
        svg = render_svg(canvas)
    descriptions = [
        f"{name}: "
        + ", ".join(f"{format_estimate(estimate)} at {position:,.0f} {unit}" for position, estimate in points)
        for name, points in lines.items()
    ]
    data: list[Sequence[object]] = [("arm", unit, metric, "low", "high")]
    data += [(name, x, e.value, e.low, e.high) for name, points in lines.items() for x, e in points]
    return Figure(svg, f"{metric}. " + "; ".join(descriptions) + ".", caption, large=is_large, data=data)


def arm_style(number: int) -> tuple[Any, Any, Any]:
    """Colour, marker and dashes of the arm with this number; the combinations of 15 arms differ."""
    colour = ARM_COLOURS[number % len(ARM_COLOURS)]
    dashes = ARM_DASHES[number // len(ARM_COLOURS) % len(ARM_DASHES)]
    return colour, ARM_MARKERS[number % len(ARM_MARKERS)], dashes


def spread_positions(positions: Mapping[str, Sequence[float]], *, log: bool = False) -> dict[str, list[float]]:
    """Shift the positions of more than two lines beside each other, by at most a third of the smallest gap.

    Examples:
        >>> spread_positions({"a": [0.0, 100.0], "b": [0.0, 100.0], "c": [0.0, 100.0]})
        {'a': [-3.0, 97.0], 'b': [0.0, 100.0], 'c': [3.0, 103.0]}
    """
    if len(positions) < 3:
        return {name: list(values) for name, values in positions.items()}
    to_axis, from_axis = (np.log, np.exp) if log else (np.array, np.array)
    ticks = to_axis(np.unique([value for values in positions.values() for value in values]))
    gap = float(np.diff(ticks).min(initial=np.ptp(ticks))) or 1.0
    width = gap * min(0.33, 0.03 * (len(positions) - 1))
    shifts = np.linspace(-width / 2, width / 2, len(positions))
    return {
        name: [float(value) for value in from_axis(to_axis(np.asarray(values, float)) + shift)]
        for (name, values), shift in zip(positions.items(), shifts, strict=True)
    }


def _count_legend_columns(names: Iterable[str], width: float) -> int:
    """Number of columns with which the longest name fits into the legend."""
    return max(1, min(4, LEGEND_WIDTH[width] // (max(map(len, names)) + 7)))


def plot_reliability(lines: Mapping[str, Calibration], caption: str, runs: Mapping[str, int]) -> Figure:
    """Plot the share of correct predictions against the predicted probability, for two arms.

    Each bin has the number of predictions and a Wilson interval, in which each case counts once over all runs.

    Args:
        lines: name to calibration with an error, the arm first.
        caption: caption of the figure.
        runs: number of runs that each calibration pools, by name.
    """
    descriptions = []
    data: list[Sequence[object]] = [
        ("arm", "predicted probability", "share of correct predictions", "low", "high", "predictions")
    ]
    with open_canvas(3.2) as (canvas, axes):
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)))
        styles = [*(arm_style(number) for number in range(len(lines) - 1)), SCRATCH_STYLE]
        for (name, calibration), (colour, marker, dashes) in zip(lines.items(), styles, strict=True):
            bins = [
                (p, o, n)
                for p, o, n in zip(calibration.mean_confidence, calibration.accuracy, calibration.counts, strict=True)
                if p is not None and o is not None
            ]
            x, y, counts = zip(*bins, strict=True)
            axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1.6, label=name)
            intervals = [wilson_interval(o * n / runs[name], n / runs[name]) for _, o, n in bins]
            axes.vlines(x, *zip(*intervals, strict=True), color=colour, linewidth=1.6, alpha=0.45)
            label_counts(axes, x, y, counts, colour, below=colour == SCRATCH_STYLE[0])
            data += [(name, p, o, *ends, n) for (p, o, n), ends in zip(bins, intervals, strict=True)]
            bin_texts = (
                f"predicted {p:.2f}, correct {o:.2f} ({low:.2f} to {high:.2f}; {n} predictions)"
                for (p, o, n), (low, high) in zip(bins, intervals, strict=True)
            )
            descriptions.append(
                f"{name}: expected calibration error {calibration.ece:.3f} over {sum(counts)} predictions; "
                + ", ".join(bin_texts)
            )
        axes.set_xlim(0, 1.04)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of correct predictions")
        draw_legend(axes)
        svg = render_svg(canvas)
    return Figure(svg, ". ".join(descriptions) + ".", caption, data=data)
