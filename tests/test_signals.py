from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medim.signals import (
    StoppedError,
    current_request,
    finish_at_signal,
    handle_shutdown_signals,
    separate_requests,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


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


def test_a_block_inside_a_deferred_one_does_not_exit() -> None:
    done = []

    @handle_shutdown_signals()
    def work() -> None:
        with current_request().deferred():
            with current_request().deferred():
                os.kill(os.getpid(), signal.SIGTERM)
            done.append("the rest of the outer block")

    with pytest.raises(StoppedError):
        work()
    assert done == ["the rest of the outer block"]


def test_a_signal_after_the_work_changes_nothing() -> None:
    with handle_shutdown_signals():
        request = current_request()
        request.close()
        os.kill(os.getpid(), signal.SIGTERM)


def test_separate_requests_stop_the_inner_work_and_not_the_outer() -> None:
    done = []

    @handle_shutdown_signals()
    def train() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("too far")

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with handle_shutdown_signals():
        previous = signal.signal(signal.SIGTERM, lambda *_: None)  # as a study does
        with separate_requests(), pytest.raises(StoppedError):
            train()
        signal.signal(signal.SIGTERM, previous)
        done.append("the next cell is not started")
    assert done == ["the next cell is not started"]


IMPATIENT = """
import os, signal, sys, time
from medim.signals import current_request, handle_shutdown_signals
with handle_shutdown_signals(), current_request().deferred():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("goes on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(120)
"""


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_ctrl_c_after_another_signal_leaves_at_once(first: str) -> None:
    run = subprocess.run([sys.executable, "-c", IMPATIENT, first], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (-signal.SIGINT, "goes on\n", "")


ENTRY = """
import os, signal, sys
from medim.__main__ import main

number = getattr(signal, sys.argv[2])

class Finder:
    def find_spec(self, name, *_):
        if name == "medim.cli":
            os.kill(os.getpid(), number)

if sys.argv[1] == "early":
    sys.meta_path.insert(0, Finder())
sys.argv[1:] = ["--version"]
try:
    main()
finally:
    os.kill(os.getpid(), number)
"""


def test_few_modules_are_imported_before_signals_are_handled() -> None:
    code = "import sys, medim.__main__; print(len(sys.modules), 'typing' in sys.modules)"
    repository = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-S", "-c", code]  # without the imports of the installation
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    n_modules, has_typing = run.stdout.split()
    assert int(n_modules) < 80, "with the metadata of packages, 138"
    assert has_typing == "False"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_before_the_command_line_is_imported_exits_with_75_and_one_after_the_command_does_not(
    name: str,
) -> None:
    repository = Path(__file__).resolve().parent.parent
    for when, code, text in (("early", 75, f"medim: stopped by {name} "), ("late", 0, "")):
        command = [sys.executable, "-c", ENTRY, when, name]
        run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=repository)
        assert (run.returncode, run.stderr[: len(text)], "Traceback" in run.stderr) == (code, text, False)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_result_is_complete_ends_only_the_rest(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    done = []
    with handle_shutdown_signals():
        done.append("result")
        with finish_at_signal("the result is complete"):
            os.kill(os.getpid(), number)
            done.append("the rest")
        done.append("summary")
    assert done == ["result", "summary"]
    assert "the result is complete" in caplog.text
