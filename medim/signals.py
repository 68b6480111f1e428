"""Shutdown on Ctrl-C, SIGTERM and SIGUSR1: a run saves a checkpoint and exits with code 75, and can be resumed.

Outside of training, a signal ends the command at once: every file is complete or absent, and the last checkpoint
contains all training so far. During training, the signal is recorded and handled between two steps. Ctrl-C after
another signal ends the process without saving.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from medim.types import UserError

log = logging.getLogger(__name__)
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
INTERRUPT_NOTE = b"\nmedim: stopping after the current step; press Ctrl-C again to leave at once\n"
SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it


class StoppedError(UserError):
    """The run was stopped by a signal after saving its state; `--resume` continues it."""

    exit_code = 75


class _ShutdownRequested(BaseException):
    """Raised on a signal; derives from BaseException so that no `except Exception` catches it."""

    exit_code = StoppedError.exit_code


def exited_after_saving(error: BaseException) -> bool:
    """Whether an error is the regular exit after a shutdown request, in this process or in the main process."""
    return getattr(error, "exit_code", getattr(error, "code", 1)) == StoppedError.exit_code


class ShutdownRequest:
    """Shutdown request of a run, set by a signal.

    Attributes:
        signal_name: name of the signal, or empty if there was none.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        self._n_deferring = 0
        self._exiting = False

    def notify(self, name: str) -> None:
        """Record a signal, and exit at once unless exits are `deferred`."""
        self.signal_name = self.signal_name or name
        self._exit_if_requested()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the block; exit at its end, also after an error, unless `respond` was called."""
        self._n_deferring += 1
        try:
            yield
        finally:
            self._n_deferring -= 1
            self._exit_if_requested()

    def respond(self, saved_state: str) -> NoReturn:
        """End the run after a recorded signal.

        Args:
            saved_state: description of the saved state, for the message.

        Raises:
            StoppedError: always.
        """
        self._exiting = True
        raise StoppedError(
            f"stopped by {self.signal_name or 'a signal to another process'}; {saved_state}, --resume continues."
        )

    def close(self) -> None:
        """Ignore later signals, because the work is done."""
        self._exiting = True

    def _exit_if_requested(self) -> None:
        if self.signal_name and not self._n_deferring and not self._exiting:
            self._exiting = True  # further signals have no effect during the exit
            raise _ShutdownRequested


_active_request: ShutdownRequest | None = None


def current_request() -> ShutdownRequest:
    """Return the shutdown request of the current run, or an inactive one."""
    return _active_request or ShutdownRequest()


@contextmanager
def handle_shutdown_signals(*, remedy: str = "the same command with --resume continues") -> Iterator[None]:
    """Handle the signals inside the block; previously installed handlers are called too.

    Has no effect inside another `handle_shutdown_signals` or outside of the main thread.

    Args:
        remedy: second part of the message, for the user.

    Raises:
        StoppedError: a signal arrived.
    """
    global _active_request
    if _active_request is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)]
    previous_handlers = {number: signal.getsignal(number) for number in numbers}
    request = _active_request = ShutdownRequest()

    def forward_signal(number: int, frame: Any) -> None:
        """Call the previous handler, and record the signal."""
        if number == signal.SIGINT:
            leave_at_next_interrupt(is_second=bool(request.signal_name))
        previous_handler = previous_handlers[signal.Signals(number)]
        if callable(previous_handler) and previous_handler is not signal.default_int_handler:
            previous_handler(number, frame)
        request.notify(signal.Signals(number).name)

    try:
        for number in numbers:
            signal.signal(number, forward_signal)
        yield
        request.close()
    except _ShutdownRequested:
        raise StoppedError(f"stopped by {request.signal_name}; all written files are complete, and {remedy}.") from None
    finally:
        request.close()
        for number, handler in previous_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _active_request = None


@contextmanager
def finish_at_signal(note: str) -> Iterator[None]:
    """End the block at a signal, and let the command end as done, because its result is complete.

    Args:
        note: message to log, with what was left out.
    """
    try:
        yield
    except (_ShutdownRequested, KeyboardInterrupt):
        log.warning("%s", note)


@contextmanager
def separate_requests() -> Iterator[None]:
    """Let `handle_shutdown_signals` inside the block act as if it was not inside another one."""
    global _active_request
    outer_request, _active_request = _active_request, None
    try:
        yield
    finally:
        _active_request = outer_request


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Block Ctrl-C for processes that are started inside the block, until they call `ignore_interrupts`.

    A terminal sends Ctrl-C to all processes, and a new one would end with a traceback. A Ctrl-C inside the block is
    handled at the end of it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C in a process that the main process ends, and end the effect of `block_interrupts`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def leave_at_next_interrupt(*, is_second: bool) -> None:
    """Let the next Ctrl-C end the process by the signal; tell the user, unless this is the second signal already.

    The note is written without the buffers of Python, which a signal handler must not use.
    """
    is_set = signal.signal(signal.SIGINT, signal.SIG_DFL) == signal.SIG_DFL  # by an inner block
    if not is_set and sys.stderr is not None and sys.stderr.isatty():
        os.write(2, SHOW_CURSOR + (b"" if is_second else INTERRUPT_NOTE))
    if is_second:
        signal.raise_signal(signal.SIGINT)
