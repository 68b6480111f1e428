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

SIGNAL_NAMES = ("SIGTERM", "SIGUSR1")


class StoppedError(UserError):
    """The run was asked to stop and saved where it was; whoever asked may start it again with --resume."""

    exit_code = 75


class _ShutdownRequested(BaseException):
    """Raised by the signal; no `except Exception` on the way keeps it."""

    exit_code = StoppedError.exit_code


def exited_after_saving(error: BaseException) -> bool:
    """Whether this is how a run leaves that was asked to, in this process or in the first."""
    return getattr(error, "exit_code", getattr(error, "code", 1)) == StoppedError.exit_code


class ShutdownRequest:
    """Whether a run was asked to stop.

    Attributes:
        signal_name: the signal's name, or empty.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._deferring = self._exiting = False

    def notify(self, name: str) -> None:
        """Note a signal, and leave at once unless `holding`."""
        self.signal_name = self.signal_name or name
        self._exit_if_requested()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals meanwhile; leave at the end, also of what failed since, where `leave` answered none."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
            self._exit_if_requested()

    def respond(self, saved_state: str) -> NoReturn:
        """Answer a noted signal.

        Args:
            saved_state: what is safe now.

        Raises:
            StoppedError: always.
        """
        self._exiting = True
        raise StoppedError(
            f"stopped by {self.signal_name or 'a signal to another process'}; {saved_state}, --resume continues."
        )

    def _exit_if_requested(self) -> None:
        if self.signal_name and not self._deferring and not self._exiting:
            self._exiting = True  # what comes while leaving changes nothing
            raise _ShutdownRequested


_active_request: ShutdownRequest | None = None


def current_request() -> ShutdownRequest:
    """The wish of the run that is on, or one that nobody expresses."""
    return _active_request or ShutdownRequest()


@contextmanager
def handle_shutdown_signals() -> Iterator[None]:
    """Hear the signals in what runs inside; handlers that were there before hear them, too.

    Inside another `handle_shutdown_signals`, or outside of the main thread, nothing changes.

    Raises:
        StoppedError: a signal came.
    """
    global _active_request
    if _active_request is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)]
    previous_handlers = {number: signal.getsignal(number) for number in numbers}
    request = _active_request = ShutdownRequest()

    def forward_signal(number: int, frame: Any) -> None:
        previous_handler = previous_handlers[signal.Signals(number)]
        if callable(previous_handler):
            previous_handler(number, frame)
        request.notify(signal.Signals(number).name)

    try:
        for number in numbers:
            signal.signal(number, forward_signal)
        yield
    except _ShutdownRequested:
        raise StoppedError(
            f"stopped by {request.signal_name}; what was written is whole, and the same command with --resume "
            f"continues."
        ) from None
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _active_request = None
