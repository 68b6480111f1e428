"""Result of an acceptance gate: verdict, measured value and allowed value."""

from __future__ import annotations

from typing import Any

GateResult = dict[str, Any]  # verdict (pass, fail or not run), measured, allowed, and what explains them


def gate_result(measured: float, allowed: float, *, ok: bool | None = None, **details: Any) -> GateResult:
    """A gate's result; without `ok` it passes where `measured <= allowed`."""
    is_pass = measured <= allowed if ok is None else ok
    return {"verdict": "pass" if is_pass else "fail", "measured": measured, "allowed": allowed, **details}


def skip_gate(reason: str) -> GateResult:
    """A gate that this machine, or this kind of package, has no use for or no tool for."""
    return {"verdict": "not run", "measured": None, "why": reason}
