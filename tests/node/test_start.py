from __future__ import annotations

import io
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from medim.cli import app
from medim.node import processes, start
from medim.node.admin import NodeAdmin
from medim.node.journal import Journal
from medim.node.monitor import serve_metrics
from medim.node.settings import NodeSettings, Peer, parse_address, write_settings
from medim.node.spool import Spool
from medim.types import UsageError, UserError
from tests.node.network.test_receiver import running, send_to
from tests.node.senders import free_port, make_series


def test_an_address_of_other_machines_requires_a_list_of_senders(
    settings: NodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[NodeSettings] = []
    monkeypatch.setattr(start, "Supervisor", lambda node: SimpleNamespace(run=lambda: started.append(node)))
    everywhere = settings.model_copy(update={"listen": parse_address("0.0.0.0:11112", "--listen")})
    with pytest.raises(UsageError, match="requires --allow"):
        start.start_node(everywhere)
    start.start_node(everywhere.model_copy(update={"allow": (Peer(ae_title="A", host="10.0.0.1"),)}))
    assert len(started) == 1
    with pytest.raises(UsageError, match="--metrics"):
        start.start_node(settings.model_copy(update={"metrics": parse_address("0.0.0.0:9112", "--metrics")}))


def test_a_worker_does_not_start_with_another_package(
    settings: NodeSettings, spool: Spool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_settings(settings)
    monkeypatch.setattr(processes, "load_package", lambda *_, **__: SimpleNamespace(sha256="another"))
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))  # noqa: SIM115, PTH123
    monkeypatch.setattr(processes, "configure_event_log", lambda _: None)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as failure:
        processes.run_process("worker-0", str(spool.root))
    assert failure.value.code == 1


def test_a_second_node_in_one_spool_is_refused(settings: NodeSettings, spool: Spool) -> None:
    with spool.lock("node"), pytest.raises(UserError, match="another node uses this spool"), spool.lock("node"):
        pass


def test_a_folder_with_other_files_does_not_become_a_spool(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="expected the spool of a node"):
        Spool(tmp_path).create()


@pytest.fixture
def held_key(settings: NodeSettings, spool: Spool) -> str:
    """A series on hold, in the spool of a node."""
    write_settings(settings)
    with running(settings, spool) as receiver:
        send_to(receiver, make_series(0))
    journal = Journal(spool.journal)
    (series,) = journal.list_series()
    journal.set_state(series.key, series.version, "held", "missing-slices")
    return series.key


def run(*words: object) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_operator_lists_shows_and_retries_a_series(spool: Spool, held_key: str) -> None:
    option = ("--spool", spool.root)
    assert f"{held_key}  held: missing-slices" in " ".join(run("status", *option).splitlines()).replace("   ", "  ")
    assert "series-held" in run("show", held_key[:8], *option)
    assert "predict" in run("retry", held_key[:8], *option)
    assert [one.state for one in Journal(spool.journal).list_series()] == ["ready"]
    refused = CliRunner().invoke(app, ["serve", "retry", held_key, "--spool", str(spool.root)])
    assert refused.exit_code == 1
    assert "cannot be tried again" in refused.output


def test_a_dropped_series_can_be_sent_again(settings: NodeSettings, spool: Spool, held_key: str) -> None:
    run("drop", held_key, "--spool", spool.root)
    assert spool.list_series() == []
    with running(settings, spool) as receiver:
        assert send_to(receiver, make_series(0, SliceThickness=2)) == [0] * 8
    (series,) = Journal(spool.journal).list_series()
    assert (series.state, series.n_instances) == ("receiving", 8)


@pytest.mark.parametrize("key", ["", "x"])
def test_an_unknown_or_ambiguous_key_is_reported(settings: NodeSettings, spool: Spool, held_key: str, key: str) -> None:
    with pytest.raises(UserError, match="key that begins so"):
        NodeAdmin(spool.root).describe_series(key)


def test_start_may_be_left_out(tmp_path: Path) -> None:
    for words in ([], ["start"]):
        result = CliRunner().invoke(app, ["serve", *words, str(tmp_path), "--spool", str(tmp_path / "spool")])
        assert result.exit_code == 3, result.output
        assert not (tmp_path / "spool").exists()


def test_metrics_and_health_are_served(settings: NodeSettings, spool: Spool, held_key: str) -> None:
    address = parse_address(f"127.0.0.1:{free_port()}", "--metrics")
    process: Any = SimpleNamespace(role="receiver", pid=1)
    settings = settings.model_copy(update={"metrics": address})
    stop = serve_metrics(settings, spool, Journal(spool.journal), [process])

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as response:
            content: bytes = response.read()
        return content.decode()

    try:
        lines = get("/metrics").splitlines()
        assert 'medim_node_series{state="held",reason="missing-slices"} 1' in lines
        assert 'medim_node_objects_total{name="received"} 8' in lines
        assert json.loads(get("/health")) == {"problems": []}
        process.pid = None
        with pytest.raises(urllib.error.HTTPError) as failure:
            get("/health")
        assert failure.value.code == 503
        assert json.load(io.TextIOWrapper(failure.value)) == {"problems": ["receiver is not running"]}
        with pytest.raises(urllib.error.HTTPError):
            get("/../../etc/passwd")
    finally:
        stop()
