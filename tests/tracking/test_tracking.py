from __future__ import annotations

import logging
import multiprocessing
import socket
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy.exc
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

import medim
from medim.cli import app
from medim.config import PretrainConfig
from medim.data.index.index import Index
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from medim.tracking import pyfunc, tracking
from medim.tracking.outbox import RECORDS, STATE, Outbox
from medim.tracking.target import check_target, tracking_uri
from medim.tracking.tracking import log_encoder, log_results, sync_pending, track_run, track_study
from medim.training import served
from medim.training.pretrain.run import pretrain
from medim.types import UserError
from tests.specs import make_spec
from tests.tracking.server import Server


def test_a_server_that_does_not_answer_is_told_at_once_and_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{taken.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(UserError, match="no MLflow server or database available") as said:
            check_target()
    assert time.monotonic() - began < 5
    assert "secret" not in str(said.value)


def test_a_target_of_no_known_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://x")
    with pytest.raises(UserError, match="nonsense://x"):
        check_target()


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("sqlite://", "in memory only, so nothing would be kept"),
        ("sqlite:///:memory:", "in memory only, so nothing would be kept"),
        ("databricks", "Databricks is not supported"),
        ("databricks://profile", "Databricks is not supported"),
        ("mlflow.example.org:5000", "expected an address such as http://SERVER:5000"),
        ("mlruns", "expected an address such as http://SERVER:5000"),
    ],
)
def test_a_target_that_keeps_nothing_or_fails_late_is_refused(
    uri: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=text):
        check_target()
    Outbox(tmp_path).add({"end": "FINISHED"})
    with pytest.raises(UserError, match=text):
        sync_pending(tmp_path)


def test_sync_goes_on_after_a_run_that_fails_and_creates_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'new.db'}")
    for name in ("empty", "left"):
        (tmp_path / name).mkdir()
    outbox = Outbox(tmp_path / "left")
    outbox.add({"run": {"experiment": "medim-pretrain", "name": "left", "tags": {}}})
    outbox.add({"artifact": "gone.txt", "to": ""})
    outbox.add({"end": "FINISHED"})
    result = CliRunner().invoke(app, ["sync", str(tmp_path / "empty"), str(tmp_path / "left")])
    output = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "not sent" in output
    assert "2 records sent" in output  # the third one is of a file that is gone
    assert "expected the folder of a tracked run" in output
    assert (tmp_path / "new.db").is_file()


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + bytes(84) + b"\xff" * 4000])
def test_a_damaged_database_is_refused_by_name(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(UserError, match=r"mlflow\.db: no MLflow server or database available") as refusal:
        check_target()
    assert "\n" not in str(refusal.value)


def test_a_study_whose_run_cannot_be_created_ends_with_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("(sqlite3.OperationalError) disk I/O error\n[SQL: INSERT INTO runs]")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr("medim.tracking.tracking.send", fail)
    with (
        pytest.raises(UserError, match="no MLflow server or database available") as refusal,
        track_study(tmp_path, "study", {}),
    ):
        pass
    assert "\n" not in str(refusal.value)


def test_a_server_that_listens_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        check_target()


def test_runs_that_start_at_once_after_one_was_killed_find_one_whole_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    (tmp_path / ".mlflow.db.new").mkdir()
    (tmp_path / ".mlflow.db.new" / "mlflow.db").write_bytes(b"a part")
    (tmp_path / ".mlflow.db.lock").touch()
    started = multiprocessing.get_context("fork")
    runs = [started.Process(target=check_target) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [run.exitcode for run in runs] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    assert [one.name for one in MlflowClient(tracking_uri()).search_experiments()] == ["Default"]


def test_a_database_that_cannot_be_created_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_disk(**_: object) -> None:
        cause = sqlite3.OperationalError("database or disk is full")
        raise sqlalchemy.exc.OperationalError("UPDATE alembic_version", {}, cause)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr("mlflow.tracking.MlflowClient", fill_disk)
    with pytest.raises(UserError, match="database or disk is full") as caught:
        check_target()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_mlflow_logs_through_the_handlers_of_the_program(caplog: pytest.LogCaptureFixture) -> None:
    check_target()
    logging.getLogger("mlflow.store").error("the disk is full")
    assert "the disk is full" in caplog.text
    assert logging.getLogger("mlflow").handlers == []


def run_of(out: Path) -> Run:
    """What MLflow knows of the run of a folder."""
    return MlflowClient(tracking_uri()).get_run(medim.files.read_json(out / STATE)["run"])


def test_a_run_is_tracked_with_configuration_numbers_figures_and_no_name_of_its_user(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    pretrain(pretrain_config, cohort_index, out, store=tmp_path / "store")
    run = run_of(out)
    assert run.info.status == "FINISHED"
    assert run.data.params["index_hash"] == cohort_index.hash
    assert run.data.params["encoder/name"] == "unet"
    assert {"local_dim", "val/local_dim", "rankme", "system/disk_usage_percentage"} <= set(run.data.metrics)
    assert run.data.tags["medim.version"] == medim.version.__version__
    assert not {"mlflow.user", "mlflow.source.name"} & set(run.data.tags)
    if (Path(medim.__file__).parents[1] / ".git").exists():
        assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    listed = {
        file.path for at in ("", "figures") for file in MlflowClient(tracking_uri()).list_artifacts(run.info.run_id, at)
    }
    assert {"config.yaml", "summary.json", "history.csv", "figures/losses.svg", "figures/phantom.png"} <= listed
    assert (out / "figures" / "views.png").is_file()
    assert "figures/views.png" not in listed, "patient images stay on site"
    assert not (out / RECORDS).exists()


def test_a_resumed_run_goes_on_in_the_same_record_and_says_nothing_twice(
    pretrain_config: PretrainConfig, tmp_path: Path
) -> None:
    def cut() -> None:
        with track_run("pretrain", pretrain_config, tmp_path, inputs={"seed": 0, "index_hash": "x"}) as tracker:
            tracker.log_metrics({"loss": 1.0}, 5)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cut()
    first = run_of(tmp_path)
    assert first.info.status == "FAILED"
    with track_run("pretrain", pretrain_config, tmp_path, inputs={"seed": 0, "index_hash": "x"}) as tracker:
        assert tracker.run_id == first.info.run_id
        tracker.log_metrics({"loss": 1.0, "held_out": 2.0}, 5)
        tracker.log_metrics({"loss": 3.0}, 6)
    assert run_of(tmp_path).info.status == "FINISHED"
    told = {
        name: [(m.step, m.value) for m in MlflowClient(tracking_uri()).get_metric_history(first.info.run_id, name)]
        for name in ("loss", "held_out")
    }
    assert told == {"loss": [(5, 1.0), (6, 3.0)], "held_out": [(5, 2.0)]}


def test_what_a_server_refuses_is_told_and_the_rest_goes_on(
    pretrain_config: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with track_run("pretrain", pretrain_config, tmp_path, inputs={"seed": 0, "index_hash": "x"}) as tracker:
        tracker.log_parameters({"seed": 1, "renamed_key": 2})  # a logged parameter does not change
        log_results(tracker, {"loss": 1.0}, [tmp_path / "absent.csv"])
    assert "MLflow keeps the earlier values of the parameters seed" in caplog.text
    assert "params was rejected" not in caplog.text
    assert run_of(tmp_path).data.params["renamed_key"] == "2"
    assert "artifact was rejected" in caplog.text
    assert run_of(tmp_path).data.params["seed"] == "0"
    assert run_of(tmp_path).data.metrics["loss"] == 1.0


def test_only_files_inside_the_folder_of_the_run_are_sent(
    pretrain_config: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (tmp_path / "id_rsa").write_text("secret")
    (run_folder / "link.txt").symlink_to(tmp_path / "id_rsa")
    (run_folder / "loss.csv").write_text("step\n")
    names = (str(tmp_path / "id_rsa"), "../id_rsa", "link.txt", "loss.csv")
    with track_run("pretrain", pretrain_config, run_folder, inputs={"seed": 0, "index_hash": "x"}) as tracker:
        for name in names:
            tracker.add({"artifact": name, "to": ""})
    run = run_of(run_folder)
    sent = {file.path for file in MlflowClient(tracking_uri()).list_artifacts(run.info.run_id)}
    assert "loss.csv" in sent
    assert not sent & {"id_rsa", "link.txt"}
    assert caplog.text.count("artifact was rejected") == 3


def test_a_resume_waits_for_a_server_that_is_away_where_a_new_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(UserError):
            check_target(tmp_path)
        (tmp_path / STATE).write_text("{}")
        check_target(tmp_path)
    assert "the records are kept" in caplog.text


def test_sync_sends_waiting_records_and_keeps_them_while_the_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync() -> tuple[int, str]:
        result = CliRunner().invoke(app, ["sync", str(tmp_path)])
        return result.exit_code, " ".join(result.output.split())

    code, output = sync()
    assert (code, list(tmp_path.iterdir())) == (1, [])
    assert "expected the folder of a tracked run" in output
    outbox = Outbox(tmp_path)
    outbox.add({"run": {"experiment": "medim-pretrain", "name": "left", "tags": {}}})
    outbox.add({"end": "FINISHED"})
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
        code, output = sync()
        assert code == 1
        assert "does not accept records" in output
        away.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
        assert "secret" not in sync()[1]
        away.setenv("MEDIM_TRACKING", "off")
        code, output = sync()
        assert code == 2
        assert "MEDIM_TRACKING=off" in output
    for count in (2, 0):
        code, output = sync()
        assert code == 0
        assert f"{count} records sent" in output
    assert run_of(tmp_path).info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_that_vanishes_and_returns_has_every_number_and_the_encoder_without_a_pickle(
    server: Server,
    pretrain_config: PretrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "medim")
    monkeypatch.setattr(tracking, "SHUTDOWN_TIMEOUT", 0.5)
    monkeypatch.setattr(tracking, "PATIENCE_SECONDS", 0.5)
    out = tmp_path / "run"
    spec = {"kind": "encoder", "encoder": pretrain_config.encoder, "in_channels": 1, "spatial_dims": 3}
    spec["input_shape"] = [16, 16, 16]
    encoder = build_encoder(make_spec(spec))
    save_model(out / "encoder", "encoder", encoder, make_spec(spec))
    (out / "encoder" / "card.md").write_text("# Encoder")
    server.start()
    check_target()
    opened = track_run("pretrain", pretrain_config, out, inputs={"seed": 0, "index_hash": "x"})
    with opened as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        while not tracker.run_id:
            time.sleep(0.05)
        server.stop()
        began = time.monotonic()
        for step in range(2, 50):
            tracker.log_metrics({"loss": float(step)}, step)
        assert time.monotonic() - began < 2  # no step waits
        log_results(tracker, {"rankme": 3.0}, [])
        log_encoder(tracker, "tiny")
    assert "does not accept records" in caplog.text
    assert "medim sync" in caplog.text
    assert (out / RECORDS).is_file()
    server.start()
    assert sync_pending(out) > 48
    assert not (out / RECORDS).exists()
    client = MlflowClient(server.uri)
    run = run_of(out)
    assert run.info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(run.info.run_id, "loss")] == [float(n) for n in range(1, 50)]
    (version,) = client.search_model_versions("name = 'medim-tiny'")
    kept = Path(client.download_artifacts(run.info.run_id, "encoder", str(tmp_path)))
    assert not [file for file in kept.rglob("*") if file.suffix in {".pkl", ".pt", ".pth"}]
    import mlflow.pyfunc

    model = mlflow.pyfunc.load_model(str(kept))
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 1, 16, 16, 16)
    example = np.load(kept / "example.npz")
    np.testing.assert_allclose(model.predict(example["input"]), example["output"], rtol=1e-5)
    assert version.run_id == run.info.run_id


def test_a_model_registered_by_an_earlier_version_finds_its_loader() -> None:
    assert served._load_pyfunc is pyfunc._load_pyfunc
