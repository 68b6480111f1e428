"""Format the numbers of a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medim.reports.figures import format_interval, format_number
from medim.study.statistics.intervals import ConfidenceInterval

INTERVAL_ENDS = ("value", "low", "high")


def format_difference(row: Mapping[str, Any]) -> str:
    """Format a difference with its interval: `+0.031 (+0.012 to +0.050)`."""
    gap = row["difference"]
    return f"{format_signed(gap['value'])} ({format_signed(gap['low'])} to {format_signed(gap['high'])})"


def format_signed(value: float) -> str:
    """Format with three decimals and a sign; the minus is a minus sign, not a hyphen."""
    return f"{value:+.3f}".replace("-", "−")


def format_p_value(p: float) -> str:
    """Format a p-value: `0.034`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def format_span(span_values: Mapping[str, Any], spec: str = ",.0f") -> str:
    """Format an estimate with censored bounds: `34 (20 to more than 150)`."""
    value, low, high = (
        f"{a['censored']} {a['value']:{spec}}".strip() for a in (span_values[end] for end in INTERVAL_ENDS)
    )
    return (value if value == low == high else f"{value} ({low} to {high})").replace("-", "−")


def format_estimate(estimate: ConfidenceInterval | None) -> str:
    """Format an estimate with its interval: `0.871 (0.862 to 0.880)`."""
    return "not defined" if estimate is None else format_interval(estimate.value, estimate.low, estimate.high)


def format_schedule_number(count: float) -> str:
    """Format a number of a schedule."""
    return f"{count:g}" if abs(count) < 1000 else format_number(count)
