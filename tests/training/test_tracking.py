from __future__ import annotations

import socket
import time

import pytest

from medim.training.tracking import check_target
from medim.types import UserError


def test_a_server_that_does_not_answer_is_told_at_once_and_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(UserError, match="expected an MLflow target that answers") as said:
            check_target()
    assert time.monotonic() - began < 5
    assert "secret" not in str(said.value)


def test_a_target_of_no_known_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(UserError, match="nonsense://x"):
        check_target()


def test_a_server_that_listens_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_target()
