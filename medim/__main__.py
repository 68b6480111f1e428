"""Entry point of the command line: `medim` and `python -m medim`.

Signals are handled before the command line is imported, which takes a second, and until the process has ended.
"""

from __future__ import annotations

import os
import signal
import sys

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def main() -> None:
    """Run the command line."""
    handle_early_signals()
    from medim.cli import app

    try:
        app()
    finally:
        ignore_late_signals()


def handle_early_signals() -> None:
    """End the process with exit code 75 on a signal, until a command handles signals itself."""
    for number in _SIGNALS:
        signal.signal(number, _exit_on_signal)


def ignore_late_signals() -> None:
    """Ignore signals, because the command has ended and its exit code is the result."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit_on_signal(number: int, _: object) -> None:
    signals = sys.modules.get("medim.signals")
    if signals is not None and getattr(signals, "_active_request", None) is not None:
        return  # the command handles it
    name = signal.Signals(number).name
    os.write(2, f"medim: stopped by {name} before or after the command; the same command starts again.\n".encode())
    os._exit(75)


if __name__ == "__main__":
    main()
