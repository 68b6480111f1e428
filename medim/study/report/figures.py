"""Figures of the study page: an arm compared with from scratch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, NullLocator

from medim.metrics.calibration import Calibration
from medim.reports.svg import ONE, SOFT, TWO, Figure, draw_legend, open_canvas, render_svg
from medim.study.report.format import format_estimate
from medim.study.statistics.intervals import ConfidenceInterval

IntervalPoints = Sequence[tuple[float, ConfidenceInterval]]  # labels or steps, and the measured interval
ARM_STYLES: Any = ((ONE, "o", "-"), (TWO, "D", (0, (5, 2))))  # the arm, from scratch


def plot_curves(
    lines: Mapping[str, IntervalPoints],
    unit: str,
    metric: str,
    caption: str,
    *,
    log: bool = False,
    level: float | None = None,
) -> Figure:
    """Plot a metric over labels or steps, for two arms with their intervals.

    Args:
        lines: name to points, the arm first.
        unit: unit of the horizontal axis.
        metric: label of the vertical axis.
        caption: caption of the figure.
        log: whether the horizontal axis is logarithmic, with a tick at each point.
        level: final level of from scratch, drawn as a horizontal line.
    """
    with open_canvas(2.9) as (canvas, axes):
        for (name, points), (colour, marker, dashes) in zip(lines.items(), ARM_STYLES, strict=False):
            x, y = [position for position, _ in points], [estimate.value for _, estimate in points]
            bounds = [estimate.low for _, estimate in points], [estimate.high for _, estimate in points]
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
        draw_legend(axes)
        svg = render_svg(canvas)
    descriptions = [
        f"{name}: "
        + ", ".join(f"{format_estimate(estimate)} at {position:,.0f} {unit}" for position, estimate in points)
        for name, points in lines.items()
    ]
    return Figure(svg, f"{metric}. " + "; ".join(descriptions) + ".", caption)


def plot_reliability(lines: Mapping[str, Calibration], caption: str) -> Figure:
    """Plot the share of correct predictions against the predicted probability, for two arms.

    Args:
        lines: name to calibration with an error, the arm first.
        caption: caption of the figure.
    """
    descriptions = []
    with open_canvas(3.2) as (canvas, axes):
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)))
        for (name, calibration), (colour, marker, dashes) in zip(lines.items(), ARM_STYLES, strict=False):
            bins = [
                (p, o, n)
                for p, o, n in zip(calibration.mean_confidence, calibration.accuracy, calibration.counts, strict=True)
                if p is not None and o is not None
            ]
            x, y, counts = zip(*bins, strict=True)
            axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1.6, label=name)
            bin_texts = (f"predicted {p:.2f}, correct {o:.2f} ({n})" for p, o, n in bins)
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
    return Figure(svg, ". ".join(descriptions) + ".", caption)
