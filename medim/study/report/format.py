"""How the numbers of a study are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medim.reports.figures import interval_text, number
from medim.study.statistics.intervals import Interval

ENDS = ("value", "low", "high")


def difference(row: Mapping[str, Any]) -> str:
    """`+0.031 (+0.012 to +0.050)`."""
    gap = row["difference"]
    return f"{signed(gap['value'])} ({signed(gap['low'])} to {signed(gap['high'])})"


def signed(value: float) -> str:
    """Three decimals with a sign that is a minus, not a hyphen."""
    return f"{value:+.3f}".replace("-", "−")


def p_value(p: float) -> str:
    """`0.034`, or `< 0.001`."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def span(found: Mapping[str, Any], spec: str = ",.0f") -> str:
    """`34 (20 to more than 150)`."""
    value, low, high = (f"{a['censored']} {a['value']:{spec}}".strip() for a in (found[end] for end in ENDS))
    return (value if value == low == high else f"{value} ({low} to {high})").replace("-", "−")


def value(found: Interval | None) -> str:
    """`0.871 (0.862 to 0.880)`."""
    return "not defined" if found is None else interval_text(found.value, found.low, found.high)


def short(count: float) -> str:
    """A number of a schedule."""
    return f"{count:g}" if abs(count) < 1000 else number(count)
