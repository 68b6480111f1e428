"""Parts of a report page: sections of facts, tables and figures. The template renders them as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medim.metrics import find_metric, higher_is_better
from medim.metrics.segmentation import FIRST_RULE_NOTE, METRIC_RULE, MISSED_NOTE
from medim.reports.figures import IntervalRow, format_interval, format_number
from medim.reports.svg import Figure

NOT_REPORTED = "not reported"
MODALITY_TEXTS = {"xray": "X-rays", "mri": "MRI"}
INTERVALS_NOTE = "Intervals: 95 % percentile bootstrap over subjects."


@dataclass(frozen=True)
class ReportTable:
    """A table; the first column names the row, the other cells are numbers or words.

    Attributes:
        caption: title of the table.
        head: column titles.
        rows: cells as text.
        note: note below the table.
        wide: whether the table takes the whole width of the page.
        prose: whether cells are words instead of numbers, aligned to the left.
        folded: whether only the title is visible until the reader opens the table.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wide: bool = False
    prose: bool = False
    folded: bool = False


@dataclass(frozen=True)
class Banner:
    """Summary of a section in one sentence; `state` sets the colour."""

    state: Literal["good", "care", "bad", "plain"]
    headline: str
    text: str


@dataclass(frozen=True)
class Tile:
    """An image of a contact sheet; without `source` the image could not be read, and `alt` gives the reason."""

    caption: str
    alt: str
    source: str | None = None


@dataclass(frozen=True)
class ContactSheet:
    """A contact sheet: caption, note, and the images with their captions; `large` for pictures of several slices."""

    caption: str
    note: str
    tiles: Sequence[Tile]
    large: bool = False


@dataclass(frozen=True)
class FoldedFigures:
    """Figures in a collapsed block."""

    title: str
    figures: Sequence[Figure]


@dataclass(frozen=True)
class ReportSection:
    """A section of the page: one run, evaluation, index or package.

    Attributes:
        anchor: id of the section in the page.
        title: heading.
        banner: summary.
        data: description of the images.
        facts: pairs of name and value.
        paragraphs: pairs of name and text, for values of several words.
        tables: tables above the figures.
        figures: figures, placed next to each other if the page is wide enough.
        folded: collapsed blocks of further figures.
        sheet: contact sheet.
        after: tables below the figures and the contact sheet.
        details: long texts in collapsed blocks: title and text.
    """

    anchor: str
    title: str
    banner: Banner
    data: str = NOT_REPORTED
    facts: Sequence[tuple[str, str]] = ()
    paragraphs: Sequence[tuple[str, str]] = ()
    tables: Sequence[ReportTable] = ()
    figures: Sequence[Figure] = ()
    folded: Sequence[FoldedFigures] = ()
    sheet: ContactSheet | None = None
    after: Sequence[ReportTable] = ()
    details: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class PageHead:
    """Head of a page.

    Attributes:
        title: kind and name of the results.
        date: date of the results, as in 2026-11-30.
        version: versions of medim that wrote the results.
        data: description of the images.
    """

    title: str
    date: str
    version: str
    data: str


def format_value(value: Any) -> str:
    """Format a value of a JSON file as text."""
    if value is None or value == "":
        return NOT_REPORTED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = all(isinstance(item, int) for item in value)
        return (" × " if numbers else ", ").join(map(str if numbers else format_value, value)) or "none"
    return str(value)


def format_bytes(count: float | None) -> str:
    """Format a number of bytes in kB, MB or GB."""
    if count is None:
        return NOT_REPORTED
    return next(
        f"{count / unit:.3g} {name}"
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if count >= unit or unit == 1
    )


def pluralise(count: int | None, word: str) -> str:
    """Format a count with its noun: `1 image`, `2 images`."""
    return f"{format_value(count)} {word}{'' if count == 1 else 's'}"


def metric_name(key: str) -> str:
    """Convert the key of a metric to a title: `hd95_left` to `HD95 left, mm`."""
    match = find_metric(key)
    if match is None:
        return key
    info, part = match
    unit = f", {info.unit}" if info.unit else ""
    if not part:
        return (info.mean_title or info.title) + unit
    return f"{info.title} {part}{unit}" if unit else f"{info.title}, {part}"


def format_metric(metric: Mapping[str, Any] | float | None) -> str:
    """Format value and interval of a metric, given as an entry of `metrics.json` or as a number."""
    if isinstance(metric, Mapping):
        text = format_interval(metric.get("value"), metric.get("ci_low"), metric.get("ci_high"))
        return f"{text}, {metric['missed']:,} of {metric['n']:,} missed" if metric.get("missed") else text
    return "not defined" if metric is None else format_number(float(metric))


def interval_cell(text: str) -> str:
    """Split the text of a value with its interval into the lines of a table cell."""
    return text.replace(" (", "\n(", 1).replace("), ", ")\n", 1)


def metric_table(metrics: Mapping[str, Any], caption: str, note: str = "") -> ReportTable:
    """Table of all metrics with their intervals and the number of images."""
    rows = []
    for key, metric in metrics.items():
        better = "higher" if higher_is_better(key) else "lower"
        cases = format_value(metric.get("n")) if isinstance(metric, Mapping) else NOT_REPORTED
        rows.append((metric_name(key), interval_cell(format_metric(metric)), better, cases))
    if any(isinstance(metric, Mapping) and metric.get("missed") for metric in metrics.values()):
        note = f"{note} {MISSED_NOTE}".strip()
    return ReportTable(caption, ("Metric", "Value (95 % interval)", "Better", "Images"), rows, note, wide=True)


def describe_metric_rule(task: object, summary: Mapping[str, Any]) -> str:
    """Describe the metric rule of a segmentation if it is that of an earlier version; else an empty text.

    Args:
        task: name or title of the task.
        summary: numbers of an evaluation, or of a study; an empty mapping without any.
    """
    is_old = str(task) == "segmentation" and summary and summary.get("metric_rule", 1) < METRIC_RULE
    return FIRST_RULE_NOTE if is_old else ""


def unit_interval_metrics(metrics: Mapping[str, Any], *, second: bool = False) -> list[IntervalRow]:
    """Select the metrics with values between 0 and 1, for a figure."""
    interval_rows = []
    for key, metric in metrics.items():
        content = metric if isinstance(metric, Mapping) else {"value": metric}
        match = find_metric(key)
        if content.get("value") is not None and (match is None or match[0].is_score):
            name = metric_name(key).replace(", mean over classes", "").replace("Surface Dice at 1 mm", "Surface Dice")
            value, low, high = (content.get(part) for part in ("value", "ci_low", "ci_high"))
            interval_rows.append(IntervalRow(name=name, value=float(value or 0.0), low=low, high=high, second=second))
    return interval_rows


def count_table(caption: str, name: str, counts: Mapping[Any, int]) -> ReportTable:
    """Table of counts, in descending order."""
    rows = [
        (str(key), format_value(count))
        for key, count in sorted(counts.items(), key=lambda item: (-item[1], str(item[0])))
    ]
    return ReportTable(caption, (name, "Number"), rows)


def format_recall(recall: float) -> str:
    """Format the fraction of a class that a model finds.

    Examples:
        >>> format_recall(0.0), format_recall(0.004), format_recall(0.07)
        ('none', 'less than 1 %', '7 %')
    """
    if recall == 0:
        return "none"
    return "less than 1 %" if recall < 0.01 else f"{100 * recall:.0f} %"
