"""SIGTERM and SIGUSR1: the wish that a run saves and leaves with exit code 75, so that it may be started again.

Outside of training whoever is asked leaves at once, as with Ctrl-C: every file is whole or absent, and the last
checkpoint holds all that was trained. In training the wish is noted, and heard between two steps.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from medim.types import UserError

NAMES = ("SIGTERM", "SIGUSR1")


class StoppedError(UserError):
    """The run was asked to stop and saved where it was; whoever asked may start it again with --resume."""

    exit_code = 75


class _Asked(BaseException):
    """Raised by the signal; no `except Exception` on the way keeps it."""

    exit_code = StoppedError.exit_code


def saved_and_left(error: BaseException) -> bool:
    """Whether this is how a run leaves that was asked to, in this process or in the first."""
    return getattr(error, "exit_code", getattr(error, "code", 1)) == StoppedError.exit_code


class Stop:
    """Whether a run was asked to stop.

    Attributes:
        asked: the signal's name, or empty.
    """

    def __init__(self) -> None:
        self.asked = ""
        self._held = self._leaving = False

    def hear(self, name: str) -> None:
        """Note a signal, and leave at once unless `holding`."""
        self.asked = self.asked or name
        self._leave_if_asked()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Only note signals meanwhile; leave at the end, also of what failed since, where `leave` answered none."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self._leave_if_asked()

    def leave(self, saved: str) -> NoReturn:
        """Answer a noted signal.

        Args:
            saved: what is safe now.

        Raises:
            StoppedError: always.
        """
        self._leaving = True
        raise StoppedError(f"stopped by {self.asked or 'a signal to another process'}; {saved}, --resume continues.")

    def _leave_if_asked(self) -> None:
        if self.asked and not self._held and not self._leaving:
            self._leaving = True  # what comes while leaving changes nothing
            raise _Asked


_running: Stop | None = None


def current() -> Stop:
    """The wish of the run that is on, or one that nobody expresses."""
    return _running or Stop()


@contextmanager
def stoppable() -> Iterator[None]:
    """Hear the signals in what runs inside; handlers that were there before hear them, too.

    Inside another `stoppable`, or outside of the main thread, nothing changes.

    Raises:
        StoppedError: a signal came.
    """
    global _running
    if _running is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    stop = _running = Stop()

    def hear(number: int, frame: Any) -> None:
        earlier = before[signal.Signals(number)]
        if callable(earlier):
            earlier(number, frame)
        stop.hear(signal.Signals(number).name)

    try:
        for number in numbers:
            signal.signal(number, hear)
        yield
    except _Asked:
        raise StoppedError(
            f"stopped by {stop.asked}; what was written is whole, and the same command with --resume continues."
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _running = None
