"""The figures of a study's page, an arm in one colour against from scratch in the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator, NullLocator

from medim.metrics.calibration import Calibration
from medim.reports.svg import ONE, SOFT, TWO, Figure, as_svg, drawing, legend_above
from medim.study.report.format import value
from medim.study.statistics.intervals import Interval

Points = Sequence[tuple[float, Interval]]  # labels or steps, and what was measured there
STYLES: Any = ((ONE, "o", "-"), (TWO, "D", (0, (5, 2))))  # the arm, from scratch


def curves(
    lines: Mapping[str, Points], unit: str, metric: str, caption: str, *, log: bool = False, level: float | None = None
) -> Figure:
    """A metric over labels or steps, two arms with their intervals.

    Args:
        lines: name to points, the arm first.
        unit: of the horizontal axis.
        metric: of the vertical one.
        caption: of the figure.
        log: a logarithmic axis with a tick at each point.
        level: that from scratch ends at, as a line.
    """
    with drawing(2.9) as (canvas, axes):
        for (name, points), (colour, marker, dashes) in zip(lines.items(), STYLES, strict=False):
            x, y = [place for place, _ in points], [found.value for _, found in points]
            ends = [found.low for _, found in points], [found.high for _, found in points]
            axes.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
            axes.vlines(x, *ends, color=colour, linewidth=1.6, alpha=0.55)
            axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1.8, label=name)
        if level is not None:
            axes.axhline(level, color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)))
        if log:
            ticks = sorted({place for points in lines.values() for place, _ in points})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(unit)
        axes.set_ylabel(metric)
        legend_above(axes)
        svg = as_svg(canvas)
    told = [
        f"{name}: " + ", ".join(f"{value(found)} at {place:,.0f} {unit}" for place, found in points)
        for name, points in lines.items()
    ]
    return Figure(svg, f"{metric}. " + "; ".join(told) + ".", caption)


def reliabilities(lines: Mapping[str, Calibration], caption: str) -> Figure:
    """The share of right answers against the probability given, two arms.

    Args:
        lines: name to calibration, the arm first.
        caption: of the figure.
    """
    told = []
    with drawing(3.2) as (canvas, axes):
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=(0, (1, 2)))
        for (name, found), (colour, marker, dashes) in zip(lines.items(), STYLES, strict=False):
            bins = [
                (p, o, n)
                for p, o, n in zip(found.predicted, found.observed, found.counts, strict=True)
                if p is not None and o is not None
            ]
            x, y, counts = zip(*bins, strict=True)
            axes.plot(x, y, color=colour, marker=marker, linestyle=dashes, markersize=5, linewidth=1.6, label=name)
            words = (f"at {p:.2f} given, {o:.2f} right ({n})" for p, o, n in bins)
            told.append(
                f"{name}: expected calibration error {found.ece:.3f} of {sum(counts)} answers; " + ", ".join(words)
            )
        axes.set_xlim(0, 1.04)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("probability given")
        axes.set_ylabel("share that was right")
        legend_above(axes)
        svg = as_svg(canvas)
    return Figure(svg, ". ".join(told) + ".", caption)
