from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from medim.cli import app
from medim.cli.tracking import track_export, track_probe
from medim.data.index.index import build_index
from medim.output_folder import STAGING
from medim.signals import handle_shutdown_signals
from medim.tracking.lineage import make_source
from medim.tracking.outbox import RECORDS, STATE
from medim.tracking.registry import check_registry
from medim.tracking.results import TrackedResult, track_result
from medim.tracking.target import SWITCH, tracking_uri
from medim.tracking.tracker import Tracker, clean_name
from medim.tracking.tracking import name_run, sync_pending, track_run
from medim.types import UsageError, UserError
from tests.evaluation.conftest import make_masks, make_run
from tests.specs import make_spec

ENCODER, MODEL = "a" * 64, "b" * 64


def find_runs(command: str, name: str) -> list[Run]:
    """The runs of a command in MLflow with a name."""
    client = MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name(f"medim-{command}")
    if experiment is None:
        return []
    return [
        client.get_run(run.info.run_id)
        for run in client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    ]


def track(result: TrackedResult) -> None:
    """Track a result."""
    track_result(result.command, lambda: result)


def make_result(folder: Path, **changes: object) -> TrackedResult:
    """A result of `evaluate` in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text("{}")
    content = {
        "command": "evaluate",
        "folder": folder,
        "name": folder.name,
        "start": 1e9,
        "parameters": {"split": "val", "versions": {"medim": "1"}},
        "metrics": {"n": 4},
        "model_metrics": {"dice_T1+C": 0.5, "dice_T1(C": 0.6},
        "tables": {"metrics_table": [{"metric": "dice", "value": 0.5}]},
        "texts": {"figures/metrics.svg": "<svg/>"},
        "files": ["metrics.json"],
    }
    return TrackedResult(**(content | changes))  # type: ignore[arg-type]


def test_a_result_is_one_finished_run_and_leaves_no_file(tmp_path: Path) -> None:
    track(make_result(tmp_path / "result-a"))
    (run,) = find_runs("evaluate", "result-a")
    assert (run.info.status, run.info.start_time) == ("FINISHED", 10**12)
    assert (run.data.params["split"], run.data.params["versions/medim"]) == ("val", "1")
    assert run.data.metrics["n"] == 4
    assert sorted(v for name, v in run.data.metrics.items() if name.startswith("dice_T1_C-")) == [0.5, 0.6]
    artifacts = {file.path for file in MlflowClient(tracking_uri()).list_artifacts(run.info.run_id)}
    assert artifacts == {"metrics.json", "metrics_table.json", "figures"}
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "metrics_table.json", "type": "table"}]
    assert [path.name for path in (tmp_path / "result-a").iterdir()] == ["metrics.json"]


def test_records_of_a_result_wait_while_the_server_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "result-b"
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")  # nobody listens
        track(make_result(out))
    assert "medim sync" in caplog.text
    assert "secret" not in caplog.text
    assert (out / RECORDS).is_file()
    assert sync_pending(out) > 4
    assert [run.info.status for run in find_runs("evaluate", "result-b")] == ["FINISHED"]


def test_records_of_a_package_wait_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result-c"
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        track(make_result(out, command="export", package_sha256="c" * 64))
    assert [path.name for path in out.iterdir()] == ["metrics.json"]
    assert (tmp_path / ".result-c.medim-mlflow" / RECORDS).is_file()
    sync_pending(out)
    (run,) = find_runs("export", "result-c")
    assert run.data.tags["medim.package.sha256"] == "c" * 64
    assert [path.name for path in tmp_path.iterdir()] == ["result-c"]


def test_an_error_of_tracking_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = make_result(tmp_path / "result-d")
    (tmp_path / "result-d" / RECORDS).mkdir()  # cannot be opened for writing
    track(result)
    assert "evaluate is not tracked" in caplog.text
    assert (tmp_path / "result-d" / "metrics.json").is_file()


def test_nothing_is_tracked_or_imported_while_tracking_is_off_or_predict_has_no_target(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.tracking.untracked import run_untracked; "
        "run_untracked(Path(sys.argv[1])); print('mlflow' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.run(command, env={**os.environ, SWITCH: "off"}, capture_output=True, text=True, check=False)
    assert process.stdout == "False\n", process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["result-e"]
    assert [path.name for path in (tmp_path / "result-e").iterdir()] == ["metrics.json"]


def test_another_value_of_the_switch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SWITCH, "of")
    with pytest.raises(UsageError, match=f"{SWITCH}=of: expected on or off"):
        track(make_result(tmp_path / "result-f"))


def test_the_source_of_a_run_is_found_by_id_or_digest_and_linked(tmp_path: Path) -> None:
    def add_run(command: str, name: str, step: str, sha256: str, source: str = "") -> Path:
        from medim.tracking.tracking import _open_run

        folder = tmp_path / name
        folder.mkdir()
        with _open_run(folder, {"experiment": f"medim-{command}", "name": name}, {}, {}, 60.0) as tracker:
            tracker.log_sources([make_source("encoder", source)] if source else [])
            tracker.log_weights(step, sha256)
        return folder

    add_run("pretrain", "encoder-1", "encoder", ENCODER)
    exact = add_run("finetune", "model-1", "model", MODEL, ENCODER)
    add_run("finetune", "model-2", "model", MODEL, "d" * 64)  # the same weights again, later
    track(make_result(tmp_path / "result-g", sources=[make_source("model", MODEL, exact)]))
    track(make_result(tmp_path / "result-h", sources=[make_source("model", MODEL)]))
    track(make_result(tmp_path / "result-i", sources=[make_source("model", "e" * 64, exact)]))
    (by_id,), (by_digest,), (absent,) = (find_runs("evaluate", f"result-{letter}") for letter in "ghi")
    ((encoder,), (model,), (later,)) = (
        find_runs(*key) for key in (("pretrain", "encoder-1"), ("finetune", "model-1"), ("finetune", "model-2"))
    )
    assert by_id.data.tags["medim.model.run_id"] == model.info.run_id
    assert by_id.data.tags["medim.encoder.run_id"] == encoder.info.run_id
    assert by_digest.data.tags["medim.model.run_id"] == later.info.run_id
    assert "medim.model.run_id" not in absent.data.tags
    note = by_id.data.tags["mlflow.note.content"]
    for run in (encoder, model):
        assert f"(#/experiments/{run.info.experiment_id}/runs/{run.info.run_id})" in note
    assert f"not tracked on this server | `{'e' * 12}`" in absent.data.tags["mlflow.note.content"]
    (output,) = model.outputs.model_outputs
    assert [used.model_id for used in by_id.inputs.model_inputs] == [output.model_id]
    measured = MlflowClient(tracking_uri()).get_logged_model(output.model_id).metrics
    assert sorted(metric.value for metric in measured or []) == [0.5, 0.6]
    assert [used.model_id for used in model.inputs.model_inputs] == [
        made.model_id for made in encoder.outputs.model_outputs
    ]


def test_a_description_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    from medim.tracking.delivery import send
    from medim.tracking.outbox import Outbox

    outbox = Outbox(tmp_path)
    tags = {"mlflow.note.content": "My note"}
    outbox.add({"run": {"experiment": "medim-evaluate", "name": "noted", "tags": tags}})
    Tracker(outbox).log_sources([make_source("model", "f" * 64)])
    send(outbox, outbox.pending())
    outbox.close()
    (run,) = find_runs("evaluate", "noted")
    assert run.data.tags["mlflow.note.content"] == "My note"
    assert run.data.tags["medim.model.sha256"] == "f" * 64


@pytest.mark.parametrize("content", ["[]", '{"run": 5}', "{"])
def test_a_damaged_state_of_a_source_has_no_run(content: str, tmp_path: Path) -> None:
    (tmp_path / STATE).write_text(content)
    assert make_source("encoder", ENCODER, tmp_path)["run_id"] == ""


@pytest.mark.parametrize("name", ["", " ", "a/b", "a:b", "../x", "-x", "x\n", "x" * 129, "x "])
def test_a_bad_name_of_a_registered_model_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="expected 1 to 128 letters"):
        check_registry(name)


def test_a_store_without_a_registry_is_refused_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "nonsense://x")
    result = CliRunner().invoke(app, ["export", str(tmp_path), "--out", str(tmp_path / "p"), "--register", "name"])
    assert result.exit_code == 1
    assert "no model registry" in " ".join(result.output.split())


def test_registration_is_refused_without_server_and_while_tracking_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        with monkeypatch.context() as away:
            away.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(UserError, match="no MLflow server"):
                check_registry("name")
    monkeypatch.setenv(SWITCH, "off")
    with pytest.raises(UsageError, match="turns tracking off"):
        check_registry("name")


@pytest.mark.parametrize("name", ["a+b", "a(b", "a//b", "/a", "a/", "../a", "a/./b", "dice, mean", "ü:"])
def test_every_name_of_a_metric_is_accepted_by_mlflow(name: str, tmp_path: Path) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    _validate_metric_name(clean_name(name))
    _validate_param_name(clean_name(name))


def test_a_training_without_tracking_writes_no_records(
    pretrain_config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "off")
    with track_run("pretrain", pretrain_config, tmp_path, inputs={"index_hash": "x"}) as tracker:  # type: ignore[arg-type]
        tracker.log_metrics({"loss": 1.0}, 1)
        assert tracker.run_id == ""
    assert list(tmp_path.iterdir()) == []


def test_a_light_installation_without_mlflow_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    track(make_result(tmp_path / "result-j"))
    assert "mlflow is not installed" in caplog.text
    assert [path.name for path in (tmp_path / "result-j").iterdir()] == ["metrics.json"]


def test_an_error_while_a_run_is_collected_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> TrackedResult:
        raise KeyError("planted")

    track_result("evaluate", fail)
    assert "evaluate is not tracked ('planted'). The result is complete" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("segmenter", "segmenter"), ("run-2", "run-2"), ("Doe_John", "other"), ("19430217", "other")],
)
def test_a_run_is_not_named_after_a_folder_that_may_name_a_person(name: str, expected: str, tmp_path: Path) -> None:
    assert name_run(tmp_path / name, "other") == expected
    assert name_run(tmp_path / name / STAGING, "other") == expected


def test_a_probe_logs_the_metrics_of_each_budget(segmenter: dict[str, Any], tmp_path: Path) -> None:
    spec = replace(make_spec(segmenter), kind="encoder", sha256=ENCODER)
    spread = {"mean": 0.8, "sd": None, "ci_low": 0.7, "ci_high": 0.9}
    row = {"features": "encoder", "budget": "10%", "subsets": 1, "auroc": spread}
    content = {
        "protocol": "linear",
        "levels": [0],
        "encoder_sha256": ENCODER,
        "index_hash": "1" * 64,
        "split_seed": 0,
        "classes": ["a", "b"],
        "split": "val",
        "n": 4,
        "subjects": 4,
        "rejected": 0,
        "rows": [{"seed": 0}],
        "summary": [row],
    }
    out = tmp_path / "probe"
    out.mkdir()
    (out / "probe.json").write_text("{}")
    track_probe(tmp_path / "encoder", spec, out, content, 1e9)
    client = MlflowClient(tracking_uri())
    experiment = client.get_experiment_by_name("medim-probe")
    assert experiment is not None
    (run, *_) = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])  # of 2001
    measured = {name: value for name, value in run.data.metrics.items() if "/" in name}
    prefix = "encoder/10 percent/auroc"
    assert measured == {prefix: 0.8, f"{prefix}_low": 0.7, f"{prefix}_high": 0.9}
    assert run.data.tags["medim.encoder.sha256"] == ENCODER


def test_evaluate_is_not_failed_by_a_server_that_is_away(
    segmenter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(make_masks(tmp_path / "source"), "mri").write(tmp_path / "index")
    run = make_run(tmp_path / "run", {**segmenter, "provenance": {"parent": ENCODER, "seed": 0}})
    words = ["evaluate", str(run), "--data", str(tmp_path / "index"), "--out", str(tmp_path / "result-k")]
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert {"metrics.json", "summary.json", RECORDS} <= {path.name for path in (tmp_path / "result-k").iterdir()}
    replaced = CliRunner().invoke(app, [*words, "--overwrite"])
    assert replaced.exit_code == 0, replaced.output
    assert not (tmp_path / "result-k" / RECORDS).exists()
    (tracked,) = find_runs("evaluate", "result-k")
    assert {"dice", "dice_low", "dice_high", "n"} <= tracked.data.metrics.keys()
    assert tracked.data.tags["medim.encoder.sha256"] == ENCODER


def test_an_export_that_cannot_be_registered_fails_and_keeps_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(*_: object) -> None:
        raise MlflowException("no", error_code=PERMISSION_DENIED)

    version: Any = {"name": "denied", "tags": {}}
    out = tmp_path / "result-m"
    out.mkdir()
    result = TrackedResult(
        command="export",
        folder=out,
        name="m",
        start=0.0,
        parameters={},
        metrics={},
        package_sha256="0",
        version=version,
    )
    package: Any = None  # is not read
    monkeypatch.setattr("medim.tracking.delivery.register_package", deny)
    monkeypatch.setattr("medim.cli.tracking._build_export_result", lambda *_: result)
    with pytest.raises(UserError, match="--register denied: the package is complete, but not registered"):
        track_export(out, package, out, "denied", 0.0)
    with pytest.raises(UserError, match="does not accept records"):
        sync_pending(out)


def test_records_from_elsewhere_register_no_folder_that_is_no_package(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "result-l"
    out.mkdir()
    (tmp_path / "id_rsa").write_text("secret")
    (out / "id_rsa").symlink_to(tmp_path / "id_rsa")
    (out / "SHA256SUMS").write_text(f"{'0' * 64}  id_rsa\n")
    records: list[dict[str, Any]] = [
        {"run": {"experiment": "medim-export", "name": out.name, "tags": {}}},
        {"text": "../../id_rsa", "content": "x"},
        {"package": {"name": "stolen", "tags": {}}},
    ]
    (out / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match="does not accept records"):
        sync_pending(out)
    (run,) = find_runs("export", out.name)
    client = MlflowClient(tracking_uri())
    assert client.list_artifacts(run.info.run_id) == []
    assert client.search_registered_models("name = 'stolen'") == []
    assert "text was rejected" in caplog.text


def test_ctrl_c_while_a_server_hangs_leaves_the_result_done_and_the_records_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hang(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal had no effect")

    monkeypatch.setattr("medim.tracking.results._send_all", hang)
    with handle_shutdown_signals():
        assert not track_result("evaluate", lambda: make_result(tmp_path))
    assert f"the result is complete. To send the records: medim sync {tmp_path}" in caplog.text
    assert (tmp_path / RECORDS).is_file(), "they are kept"
