"""Result of an acceptance gate: verdict, measured value and allowed value."""

from __future__ import annotations

from typing import Any

Gate = dict[str, Any]  # verdict (pass, fail or not run), measured, allowed, and what explains them


def gate(measured: float, allowed: float, *, ok: bool | None = None, **details: Any) -> Gate:
    """A gate's result; without `ok` it passes where `measured <= allowed`."""
    passed = measured <= allowed if ok is None else ok
    return {"verdict": "pass" if passed else "fail", "measured": measured, "allowed": allowed, **details}


def not_run(why: str) -> Gate:
    """A gate that this machine, or this kind of package, has no use for or no tool for."""
    return {"verdict": "not run", "measured": None, "why": why}
