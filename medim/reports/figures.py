"""Figures of the report, one function per kind; `open_canvas` defines their style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from medim.reports.svg import INK, ONE, SOFT, TWO, Figure, draw_legend, open_canvas, render_svg
from medim.types import Array

MAX_POINTS = 300
MAX_BINS = 24
Z_95 = 1.959964  # quantile of the normal distribution for 95 % intervals


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """A loss over the steps of a run.

    Attributes:
        name: name of the objective.
        steps: (n,) steps of the training losses.
        loss: (n,) training losses.
        val: pairs of step and loss on the validation subjects.
        chance: loss of an uninformed network, or None.
    """

    name: str
    steps: Array
    loss: Array
    val: Sequence[tuple[int, float]] = ()
    chance: float | None = None


@dataclass(frozen=True, kw_only=True)
class IntervalRow:
    """A value with its 95 % interval (None if there is no interval)."""

    name: str
    value: float
    low: float | None
    high: float | None
    second: bool = False  # belongs to the second of two arms


def loss_curve(curve: LossCurve) -> Figure:
    """Plot training loss, its running mean, the validation loss and the chance level."""
    finite = np.isfinite(curve.loss)
    steps, loss = thin_curve(curve.steps[finite], curve.loss[finite])
    with open_canvas(2.7) as (canvas, axes):
        axes.plot(steps, loss, color=ONE, alpha=0.35, linewidth=1)
        axes.plot(steps, _running_mean(loss), color=ONE, linewidth=2, label="training")
        if curve.val:
            axes.plot(*zip(*curve.val, strict=True), "o", color=TWO, markersize=5, label="validation")
        if curve.chance is not None:
            axes.axhline(curve.chance, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="chance")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        if curve.val or curve.chance is not None:
            draw_legend(axes)
        svg = render_svg(canvas)
    first, last = (f"{v:.3g}" for v in (loss[0], loss[-1])) if len(loss) else ("no number", "no number")
    name_text = "" if curve.name == "loss" else f" of {curve.name}"
    parts = [f"Training loss{name_text} over {int(curve.steps[-1])} steps: {first} at first, {last} at last"]
    if curve.val:
        parts.append(f"{curve.val[-1][1]:.3g} on validation subjects")
    if curve.chance is not None:
        parts.append(f"chance level {curve.chance:.3g}")
    caption = "Training loss" if curve.name == "loss" else f"Loss of {curve.name}"
    data: list[Sequence[object]] = [("part", "step", "loss")]
    data += [("training", step, value) for step, value in zip(steps, loss, strict=True)]
    data += [("validation", step, value) for step, value in curve.val]
    data += [] if curve.chance is None else [("chance", "", curve.chance)]
    return Figure(svg, "; ".join(parts) + ".", caption, data=data)


def line_plot(
    points_by_name: Mapping[str, Sequence[tuple[int, float]]], label: str, caption: str, *, log: bool = False
) -> Figure:
    """Plot values over the steps of a run, one line per name.

    Args:
        points_by_name: name to pairs of step and value, at least one.
        label: label of the vertical axis.
        caption: caption of the figure.
        log: whether the vertical axis is logarithmic.
    """
    with open_canvas(2.2) as (canvas, axes):
        for line_number, (name, pairs) in enumerate(points_by_name.items()):
            steps, values = thin_curve(np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]))
            colour = (ONE, TWO, INK)[line_number % 3]
            axes.plot(steps, values, color=colour, linewidth=1.5, label=name, marker="o" if len(steps) < 30 else None)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the default one writes formulas
            axes.yaxis.set_minor_formatter(NullFormatter())
        if len(points_by_name) > 1:
            draw_legend(axes)
        svg = render_svg(canvas)
    last = ", ".join(f"{name} {pairs[-1][1]:.3g} at step {pairs[-1][0]}" for name, pairs in points_by_name.items())
    data = [("name", "step", label), *((name, *pair) for name, pairs in points_by_name.items() for pair in pairs)]
    return Figure(svg, f"{caption}: {last}.", caption, data=data)


def interval_plot(rows: Sequence[IntervalRow], caption: str, *, arms: tuple[str, str] | None = None) -> Figure:
    """Plot values between 0 and 1 as dots with their intervals as lines.

    Args:
        rows: rows from top to bottom; rows of the same name share a line.
        caption: caption of the figure.
        arms: names of the two arms, if there are two; each has a colour.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    with open_canvas(0.75 + 0.34 * len(names) * (1.4 if arms else 1)) as (canvas, axes):
        for row in rows:
            y = names.index(row.name) + (0.0 if arms is None else 0.16 if row.second else -0.16)
            colour = TWO if row.second else ONE
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [y, y], color=colour, linewidth=2.5, alpha=0.55)
            marker = "D" if row.second else "o"
            label = arms[row.second] if arms and row.name == names[0] else None
            axes.plot(row.value, y, marker, color=colour, markersize=6, linestyle="none", label=label)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        _set_unit_axis(axes, [v for row in rows for v in (row.value, row.low) if v is not None])
        axes.grid(axis="y", visible=False)
        if arms:
            draw_legend(axes)
        svg = render_svg(canvas)
    descriptions = [
        f"{_arm_prefix(row, arms)}{row.name} {format_interval(row.value, row.low, row.high)}" for row in rows
    ]
    data = [
        ("name", "arm", "value", "low", "high"),
        *((row.name, arms[row.second] if arms else "", row.value, row.low, row.high) for row in rows),
    ]
    return Figure(svg, "; ".join(descriptions) + ".", caption, data=data)


def strip_plot(values: Mapping[str, Sequence[float]], label: str, caption: str, *, dot: str = "image") -> Figure:
    """Plot values between 0 and 1: one line per class, one dot per case (named by `dot`), and the median.

    Values that are not finite are omitted.
    """
    values = {name: finite for name, numbers in values.items() if (finite := [v for v in numbers if np.isfinite(v)])}
    with open_canvas(0.8 + 0.5 * len(values)) as (canvas, axes):
        for line_number, numbers in enumerate(values.values()):
            ordered = np.sort(np.asarray(numbers))
            jitter = 0.28 * (np.arange(len(ordered)) * 0.618034 % 1 - 0.5) * 2  # evenly spread and deterministic
            axes.plot(ordered, line_number + jitter, "o", color=ONE, markersize=3.5, alpha=0.6, markeredgewidth=0)
            axes.plot([np.median(ordered)] * 2, [line_number - 0.38, line_number + 0.38], color=TWO, linewidth=2.5)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.45, -0.55)
        _set_unit_axis(axes, [min(v) for v in values.values()])
        axes.set_xlabel(f"{label} of each {dot}; the bar is the median")
        axes.grid(axis="y", visible=False)
        svg = render_svg(canvas)
    descriptions = [
        f"{name}: median {np.median(v):.3g}, lowest {np.min(v):.3g}, highest {np.max(v):.3g}"
        for name, v in values.items()
    ]
    data = [("group", label), *((name, float(value)) for name, numbers in values.items() for value in numbers)]
    return Figure(svg, f"{label} of each {dot}. " + "; ".join(descriptions) + ".", caption, data=data)


def volume_scatter(
    truth: Mapping[str, Sequence[float]],
    predicted: Mapping[str, Sequence[float]],
    caption: str,
    quantity: str = "volume, ml",
) -> Figure:
    """Plot predicted against true values, with the line of equality; values that are not finite have no dot.

    Args:
        truth: true values by class.
        predicted: predicted values by class, in the same order.
        caption: caption of the figure.
        quantity: name of the values, with their unit after a comma.
    """
    name_of_values, *units = quantity.split(", ")
    unit = "".join(f" {name}" for name in units)
    markers, colours = "oDs^v", (ONE, TWO, INK)
    with open_canvas(3.4) as (canvas, axes):
        for class_number, name in enumerate(truth):
            style: Any = {
                "marker": markers[class_number % 5],
                "color": colours[class_number % 3],
                "alpha": 0.65,
                "markeredgewidth": 0,
            }
            axes.plot(truth[name], predicted[name], linestyle="none", markersize=4.5, label=name, **style)
        values = np.concatenate([np.asarray(v, float) for v in (*truth.values(), *predicted.values())])
        values = values[np.isfinite(values)]
        axis_limit = max(float(np.max(values, initial=0)) * 1.05, 0.0) or 1.0
        low = min(float(np.min(values, initial=0)) * 1.05, 0.0)
        axes.plot([low, axis_limit], [low, axis_limit], color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(low, axis_limit)
        axes.set_ylim(low, axis_limit)
        axes.set_xlabel(f"true {quantity}")
        axes.set_ylabel(f"predicted {quantity}")
        draw_legend(axes)
        svg = render_svg(canvas)
    gaps = {name: np.subtract(predicted[name], truth[name]) for name in truth}
    descriptions = [
        f"{name}: predicted minus true {name_of_values} {v.mean():+.3g}{unit} on average, SD {v.std():.2g}"
        for name, v in gaps.items()
    ]
    data: list[Sequence[object]] = [("class", f"true {quantity}", f"predicted {quantity}")]
    data += [(name, *map(float, pair)) for name in truth for pair in zip(truth[name], predicted[name], strict=True)]
    return Figure(svg, "; ".join(descriptions) + ".", caption, data=data)


def reliability_diagram(confidence: Array, is_correct: Array, ece: float | None, caption: str) -> Figure:
    """Plot the share of correct predictions against the predicted probability, in ten bins.

    Cases without a finite probability are omitted.

    Args:
        confidence: (N,) probability of the predicted class.
        is_correct: (N,) whether the prediction is correct.
        ece: calibration error of `metrics.json`, for the text alternative.
        caption: caption of the figure.
    """
    is_finite = np.isfinite(confidence)
    confidence, is_correct = confidence[is_finite], is_correct[is_finite]
    bins = np.clip(np.ceil(confidence * 10) - 1, 0, 9).astype(int)
    bin_masks = [(b, bins == b) for b in range(10) if (bins == b).any()]
    x, y = ([float(v[mask].mean()) for _, mask in bin_masks] for v in (confidence, is_correct.astype(float)))
    with open_canvas(3.2) as (canvas, axes):
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        sizes = [20 + 180 * mask.mean() for _, mask in bin_masks]
        intervals = [wilson_interval(int(is_correct[mask].sum()), int(mask.sum())) for _, mask in bin_masks]
        for place, (low, high) in zip(x, intervals, strict=True):
            axes.plot([place, place], [low, high], color=ONE, linewidth=2, alpha=0.4)
        axes.plot(x, y, color=ONE, linewidth=1.5)
        axes.scatter(x, y, s=sizes, color=ONE, alpha=0.7, linewidths=0)
        label_counts(axes, x, y, [int(mask.sum()) for _, mask in bin_masks], ONE)
        axes.set_xlim(0, 1.04)
        axes.set_ylim(0, 1.04)
        axes.set_xlabel("predicted probability")
        axes.set_ylabel("share of correct predictions")
        svg = render_svg(canvas)
    description = "; ".join(
        f"predicted {a:.2f}, correct {b:.2f} ({low:.2f} to {high:.2f}; {int(m.sum())} images)"
        for a, b, (low, high), (_, m) in zip(x, y, intervals, bin_masks, strict=True)
    )
    error = "" if ece is None else f" Expected calibration error {ece:.3f}."
    data: list[Sequence[object]] = [("predicted probability", "share of correct predictions", "low", "high", "images")]
    data += [(a, b, *ends, int(m.sum())) for a, b, ends, (_, m) in zip(x, y, intervals, bin_masks, strict=True)]
    return Figure(svg, f"{description}.{error}", caption, data=data)


def plot_histogram(values: Mapping[str, Sequence[float]], label: str, caption: str) -> Figure:
    """Plot the distribution of values over images, one line per group, on common bins.

    Args:
        values: group to values, at most three groups.
        label: name of the values, with their unit.
        caption: caption of the figure.
    """
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, float) for v in values.values()]), bins=MAX_BINS)
    styles: Any = ((ONE, "-"), (TWO, (0, (5, 2))), (INK, (0, (1, 1.5))))
    with open_canvas(2.3) as (canvas, axes):
        for (name, numbers), (colour, line) in zip(values.items(), styles, strict=False):
            counts = np.histogram(numbers, edges)[0]
            axes.stairs(counts, edges, color=colour, linestyle=line, linewidth=1.8, label=name)
        axes.set_xlabel(label)
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if len(values) > 1:
            draw_legend(axes)
        svg = render_svg(canvas)
    descriptions = []
    for name, numbers in values.items():
        low, lower_quartile, median, upper_quartile, high = (
            f"{v:.4g}" for v in np.percentile(numbers, [0, 25, 50, 75, 100])
        )
        group_prefix = f"{name}: " if len(values) > 1 else ""
        descriptions.append(
            f"{group_prefix}{low} to {high}, median {median}, interquartile range {lower_quartile} to {upper_quartile}"
        )
    data: list[Sequence[object]] = [("group", f"{label}, from", "to", "images")]
    data += [
        (name, float(low), float(high), int(count))
        for name, numbers in values.items()
        for low, high, count in zip(edges[:-1], edges[1:], np.histogram(numbers, edges)[0], strict=True)
    ]
    text = f"{label}, of {len(next(iter(values.values())))} images. " + "; ".join(descriptions) + "."
    return Figure(svg, text, caption, data=data)


def wilson_interval(successes: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); trials are independent, and their number need not be whole."""
    share, weight = successes / trials, Z_95**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half_width = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def label_counts(
    axes: Axes, x: Sequence[float], y: Sequence[float], counts: Sequence[int], colour: str, *, below: bool = False
) -> None:
    """Write the number of cases beside each point of a curve."""
    for a, b, count in zip(x, y, counts, strict=True):
        offset, alignment = ((4, -4), "top") if below else ((-4, 4), "bottom")
        sides: Any = {"ha": "left" if below else "right", "va": alignment}
        axes.annotate(f"{count:,}", (a, b), offset, textcoords="offset points", color=colour, fontsize=8, **sides)


def roc_curve(curves: Mapping[str, tuple[Array, Array]], caption: str) -> Figure:
    """Plot the sensitivity against 1 - specificity over all thresholds, one curve per class.

    Args:
        curves: false positive rates and sensitivities, both increasing from 0 to 1, by class.
        caption: caption of the figure.
    """
    with open_canvas(3.4) as (canvas, axes):
        axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
        for number, (name, (false_positive_rates, sensitivities)) in enumerate(curves.items()):
            style: Any = {"color": (ONE, TWO, INK)[number % 3], "linestyle": ("-", "--", ":")[number // 3 % 3]}
            axes.plot(false_positive_rates, sensitivities, linewidth=1.8, label=name, **style)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("1 - specificity")
        axes.set_ylabel("sensitivity")
        if len(curves) > 1:
            draw_legend(axes)
        svg = render_svg(canvas)
    descriptions = []
    data: list[Sequence[object]] = [("class", "1 - specificity", "sensitivity")]
    for name, (false_positive_rates, sensitivities) in curves.items():
        points = [
            f"{sensitivities[false_positive_rates <= share + 1e-9].max():.2f} at specificity {1 - share:.2f}"
            for share in (0.05, 0.1, 0.2)
        ]
        descriptions.append(f"{name}: sensitivity {', '.join(points)}")
        indices = np.unique(np.linspace(0, len(sensitivities) - 1, MAX_POINTS).astype(int))
        data += [(name, float(false_positive_rates[k]), float(sensitivities[k])) for k in indices]
    return Figure(svg, "; ".join(descriptions) + ".", caption, data=data)


def format_interval(value: float | None, low: float | None, high: float | None) -> str:
    """Format a value with its interval: `0.871 (0.862 to 0.880)`."""
    if value is None:
        return "not defined"
    return (
        format_number(value)
        if low is None or high is None
        else f"{format_number(value)} ({format_number(low)} to {format_number(high)})"
    )


def format_number(value: float) -> str:
    """Format a number with three decimals below ten, and three digits above."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _arm_prefix(row: IntervalRow, arms: tuple[str, str] | None) -> str:
    return f"{arms[row.second]}, " if arms else ""


def _running_mean(values: Array) -> Array:
    """Running mean over a twentieth of the curve, with a narrower window at its ends."""
    half_window = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half_window, 0)
    high = np.minimum(np.arange(len(values)) + half_window + 1, len(values))
    return np.asarray((total[high] - total[low]) / (high - low))


def thin_curve(steps: Array, values: Array) -> tuple[Array, Array]:
    """Reduce a curve to at most MAX_POINTS points, by means over equal parts."""
    if len(values) <= MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(values), MAX_POINTS + 1).astype(int)
    counts = np.diff(edges)
    sums = (np.add.reduceat(v.astype(np.float64), edges[:-1]) for v in (steps, values))
    x, y = (total / counts for total in sums)
    return x, y


def _set_unit_axis(axes: Axes, values: Sequence[float]) -> None:
    """Set the axis from the tenth below the smallest value (at most 0.8) to 1; a dot plot does not need a zero."""
    low = min(0.8, np.floor(min(values, default=1.0) * 10) / 10)
    axes.set_xlim(low - 0.02 * (1 - low), 1 + 0.02 * (1 - low))
    axes.xaxis.set_major_locator(MaxNLocator(5))
