from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from medim.signals import StoppedError, current_request, handle_shutdown_signals

SIGNALS = [signal.SIGTERM, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def _harmless() -> Iterator[None]:
    """A signal that nobody hears must not end the tests."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_training_a_signal_leaves_at_once_with_75(number: signal.Signals) -> None:
    after = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            after.append("went on")
        except Exception:  # the wide net of someone else's code
            after.append("swallowed")

    with pytest.raises(StoppedError, match=f"stopped by {number.name}") as stopped, handle_shutdown_signals():
        work()
    assert stopped.value.exit_code == 75
    assert not after
    assert all(signal.getsignal(n) == signal.SIG_IGN for n in SIGNALS)


def test_what_is_held_is_done_first_and_the_signal_is_not_lost() -> None:
    done = []

    @handle_shutdown_signals()
    def work() -> None:
        with current_request().deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert current_request().signal_name == "SIGTERM"
            done.append("the step")
        done.append("too far")

    with pytest.raises(StoppedError):
        work()
    assert done == ["the step"]


def test_what_fails_after_a_signal_leaves_with_75_too() -> None:
    @handle_shutdown_signals()
    def work() -> None:
        with current_request().deferred():
            os.kill(os.getpid(), signal.SIGUSR1)
            raise RuntimeError("a data worker heard it as well, and is gone")

    with pytest.raises(StoppedError, match="SIGUSR1"):
        work()


def test_an_answered_signal_is_answered_once() -> None:
    cleaned = []

    @handle_shutdown_signals()
    def work() -> None:
        try:
            with current_request().deferred():
                os.kill(os.getpid(), signal.SIGUSR1)
                current_request().respond("step 3 is saved")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # an impatient second one
            cleaned.append(True)

    with pytest.raises(StoppedError, match="SIGUSR1; step 3 is saved"):
        work()
    assert cleaned


def test_a_handler_that_was_there_before_hears_it_too() -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append("study"))
    with pytest.raises(StoppedError), handle_shutdown_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ["study"]


def test_inside_another_the_outer_one_answers() -> None:
    @handle_shutdown_signals()
    def work() -> None:
        with handle_shutdown_signals():
            outer = current_request()
        assert current_request() is outer
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        work()
    assert current_request().signal_name == ""


def test_a_run_without_a_signal_is_left_alone() -> None:
    with handle_shutdown_signals(), current_request().deferred():
        pass
