"""The main job against a real MLflow server: from a package to its encoder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from typer.testing import CliRunner

from medim.cli import app
from medim.config import FinetuneConfig, PretrainConfig, dump_config
from medim.data.index.index import Index
from medim.package.package import verify_package
from tests.tracking.server import Server

PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def run_medim(*words: str) -> str:
    """Run a command that succeeds; returns its output."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, f"{words}: {result.output} {result.exception}"
    return result.output


def find_run(client: MlflowClient, command: str) -> Run:
    """The only run of a command."""
    experiment = client.get_experiment_by_name(f"medim-{command}")
    assert experiment is not None, command
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    return client.get_run(found.info.run_id)


def list_files(client: MlflowClient, run: Run, folder: str | None = None) -> set[str]:
    """All artifacts of a run."""
    files = set()
    for entry in client.list_artifacts(run.info.run_id, folder):
        files |= list_files(client, run, entry.path) if entry.is_dir else {entry.path}
    return files


@pytest.mark.slow
@pytest.mark.usefixtures("short_gates")
def test_the_main_job_links_a_registered_package_to_its_evaluation_model_and_encoder(
    server: Server,
    volumes: Path,
    pretrain_config: PretrainConfig,
    finetune_config: FinetuneConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.start()
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    shutil.copytree(volumes, "scans")
    Path("pretrain.yaml").write_text(dump_config(pretrain_config.model_copy(update={"max_steps": 2})))
    Path("finetune.yaml").write_text(dump_config(finetune_config.model_copy(update={"max_steps": 2})))
    run_medim("index", "scans", "--modality", "mri", "--out", "index")
    run_medim("pretrain", "--data", "index", "--config", "pretrain.yaml", "--out", "runs/encoder")
    words = ("--task", "segmentation", "--data", "index", "--config", "finetune.yaml")
    run_medim("finetune", *words, "--encoder", "runs/encoder", "--out", "runs/segmenter")
    run_medim("evaluate", "runs/segmenter", "--data", "index", "--out", "runs/evaluation")
    run_medim("export", "runs/segmenter", "--out", "package", "--register", "ball segmenter")
    run_medim("predict", "package", "scans/imagesTr/case_00.nii.gz", "--out", "predictions")
    assert not list(work.rglob("*.jsonl")) or [p.name for p in work.rglob("*.jsonl")] == ["progress.jsonl"]

    client = MlflowClient(server.uri)
    encoder, model, evaluation, package, prediction = (
        find_run(client, command) for command in ("pretrain", "finetune", "evaluate", "export", "predict")
    )
    _check_links(encoder, model, evaluation, package, prediction)
    _check_results(client, model, evaluation, package, prediction)
    records = Index.read(Path("index")).records
    names = {name for record in records for name in (record.image, record.subject) if len(name) > 3}
    assert len(names) > 10
    for run in (encoder, model, evaluation, package, prediction):
        _check_no_names(client, run, names)
    version = client.get_model_version_by_alias("ball segmenter", "candidate")
    assert version.run_id == package.info.run_id
    assert version.tags["medim.package_sha256"] == package.data.tags["medim.package.sha256"]
    assert (version.tags["medim.kind"], version.tags["medim.modality"]) == ("segmenter", "mri")
    for run in (encoder, model, evaluation, package):
        assert f"/runs/{run.info.run_id})" in version.description
    import mlflow.artifacts

    downloaded = mlflow.artifacts.download_artifacts("models:/ball segmenter@candidate", tracking_uri=server.uri)
    checks = {check.name: check for check in verify_package(downloaded)}
    assert not [check for check in checks.values() if check.verdict == "fail"]
    assert "models/model.pt" in checks["files"].detail
    stored = [path.suffix for path in (tmp_path / "artifacts").rglob("*") if path.is_file()]
    assert len(stored) > 20
    assert not PICKLES & set(stored)


def _check_no_names(client: MlflowClient, run: Run, names: set[str]) -> None:
    """Check that no parameter, tag or artifact contains the key of an image or subject, or a path of this machine."""
    texts = [*run.data.params.values(), *run.data.tags.values(), *run.data.metrics, run.info.run_name]
    for file in list_files(client, run):
        texts.append(Path(client.download_artifacts(run.info.run_id, file)).read_bytes().decode(errors="replace"))
    for word in (*names, str(Path.cwd()), str(Path.home())):
        assert [text[:200] for text in texts if word in text] == [], word


def _check_links(encoder: Run, model: Run, evaluation: Run, package: Run, prediction: Run) -> None:
    """Check tags, links and logged models of the chain."""
    steps = {"encoder": encoder, "model": model, "evaluation": evaluation, "package": package}
    sources = {
        model: ("encoder",),
        evaluation: ("encoder", "model"),
        package: ("encoder", "model", "evaluation"),
        prediction: ("encoder", "model", "package"),
    }
    for run, names in sources.items():
        for name in names:
            source = steps[name].info
            assert run.data.tags[f"medim.{name}.run_id"] == source.run_id
            assert (
                f"(#/experiments/{source.experiment_id}/runs/{source.run_id})" in run.data.tags["mlflow.note.content"]
            )
        assert not {f"medim.{name}.run_id" for name in steps.keys() - names} & run.data.tags.keys()
    assert model.data.tags["medim.encoder.sha256"] == encoder.data.tags["medim.weights.sha256"]
    assert package.data.tags["medim.model.sha256"] == model.data.tags["medim.weights.sha256"]
    made = {name: [m.model_id for m in run.outputs.model_outputs] for name, run in steps.items()}
    assert len(made["encoder"]) == len(made["model"]) == 1
    assert [m.model_id for m in model.inputs.model_inputs] == made["encoder"]
    for run in (evaluation, package, prediction):
        assert [m.model_id for m in run.inputs.model_inputs] == made["model"]


def _check_results(client: MlflowClient, model: Run, evaluation: Run, package: Run, prediction: Run) -> None:
    """Check names, parameters, metrics and artifacts of the runs."""
    assert [run.info.run_name for run in (model, evaluation)] == ["segmenter", "evaluation"]
    assert model.data.params["init"] == "pretrained"
    assert {"val/dice", "val/dice_low", "val/dice_high"} <= model.data.metrics.keys()
    low, value, high = (evaluation.data.metrics[name] for name in ("dice_low", "dice", "dice_high"))
    assert low <= value <= high
    (output,) = model.outputs.model_outputs
    measured = {metric.key: metric.value for metric in client.get_logged_model(output.model_id).metrics or []}
    assert measured["dice"] == value
    (dataset,) = evaluation.inputs.dataset_inputs
    assert evaluation.data.params["index_hash"].startswith(dataset.dataset.digest)
    assert list_files(client, evaluation) == {
        *("metrics.json", "summary.json", "metrics_table.json", "figures/metrics.svg")
    }
    assert {"medim.json", "MODEL_CARD.md", "package/medim.json", "package/models/model.onnx"} <= list_files(
        client, package
    )
    assert (prediction.data.metrics["predicted"], prediction.data.metrics["rejected"]) == (1, 0)
    assert list_files(client, prediction) == set()
