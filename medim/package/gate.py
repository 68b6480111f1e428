"""Result of an acceptance gate: verdict, measured value and allowed value."""

from __future__ import annotations

GateResult = dict[str, object]  # verdict (pass, fail or not run), measured, allowed, and details


def gate_result(measured: float, allowed: float, *, ok: bool | None = None, **details: object) -> GateResult:
    """Build the result of a gate; if `ok` is None, the gate passes if `measured <= allowed`."""
    is_pass = measured <= allowed if ok is None else ok
    return {"verdict": "pass" if is_pass else "fail", "measured": measured, "allowed": allowed, **details}


def skip_gate(reason: str) -> GateResult:
    """Build the result of a gate that does not apply to this package or needs a tool that is not installed."""
    return {"verdict": "not run", "measured": None, "why": reason}
