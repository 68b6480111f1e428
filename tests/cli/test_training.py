"""`medim plan` and `medim finetune` on the command line: figures, exit codes, messages of rejected options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import medim.training.finetune.run as finetuning
import medim.training.plan.plan as planning
import medim.training.pretrain.run as pretraining
from medim.cli import app
from medim.cli.training import _format_pretraining
from medim.files import read_json
from medim.types import UserError

TOLD: dict[str, Any] = {
    "hours": 1.5,
    "seconds": {"start": 100.0, "steps": 5000.0, "validations": 200.0, "checkpoints": 10.0, "end": 90.0, "total": 5400},
    "seconds_per_step": 0.5,
    "measured_steps": 20,
    "measured_batch_size": 4,
    "peak_memory_bytes": 2 * 2**30,
    "memory_bytes": 3 * 2**30,
    "disk_bytes": {"store": 2**30, "checkpoints": 2**29, "run": 2**29, "total": 2 * 2**30},
    "available": {"memory": 8 * 2**30, "disk": 9 * 2**30, "store": 9 * 2**30},
    "suggestions": {"batch_size": 8, "views": [40, 40]},
    "refusals": [],
}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    arrays: dict[str, Any] = {}
    for seed, part in enumerate(("train", "val")):
        images = np.random.default_rng(seed).integers(0, 255, (6, 28, 28), np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": np.zeros((6, 1), int)}
    np.savez(tmp_path / "noise.npz", **arrays)
    return tmp_path / "noise.npz"


def test_the_verdict_of_a_run_is_printed_with_reason_and_advice_unless_it_is_learning() -> None:
    summary: dict[str, Any] = {
        "verdict": "collapsed",
        "verdict_reason": "RankMe 1.2",
        "advice": "Lower the learning rate.",
        "loss": {},
        "diagnostics": {},
        "chance": {},
        "rankme": 1.2,
        "feature_std": 0.01,
        "seconds_per_step": 0.5,
        "peak_memory_bytes": 2**20,
    }
    rows = _format_pretraining(summary)
    assert list(rows)[:3] == ["verdict", "reason", "advice"]
    assert (rows["reason"], rows["advice"]) == ("RankMe 1.2", "Lower the learning rate.")
    assert rows["seconds per step"] == 0.5
    assert not {"reason", "advice"} & set(_format_pretraining({**summary, "verdict": "learning"}))


def test_a_plan_that_fits_is_printed_and_written(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        planning, "plan_pretraining", lambda config, index, out, **_: given.append((config, index)) or TOLD
    )
    command = ["plan", "--config", "xray-28", "--data", str(pictures), "--set", "max_steps=7"]
    done = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    assert "1.5 (start 100 s, steps 1 h 24 min, validations 4 min," in done.output
    assert "2.00 GiB, 3.00 GiB with loading processes; 8.00 GiB free" in done.output
    assert "a batch of 8 or views of 40x40, by proportion" in done.output
    assert given[0][0].max_steps == 7
    assert len(given[0][1].records) == 12
    assert read_json(tmp_path / "plan.json")["hours"] == 1.5


def test_a_plan_that_does_not_fit_leaves_with_one_sentence(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {**TOLD, "refusals": ["memory: too much.", "disk: too much."]}
    monkeypatch.setattr(planning, "plan_pretraining", lambda *_, **__: told)
    refused = CliRunner().invoke(app, ["plan", "--config", "xray-28", "--data", str(pictures)])
    assert refused.exit_code == 1
    assert "medim: memory: too much." in refused.output


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--data", "."], 2, "--modality: mri or xray is required"),
        (["--config", "xray-29"], 2, "Did you mean 'xray-28' or 'xray'?"),
        (["--config", "xray-28", "--modality", "mri"], 1, "this configuration is for xray"),
        (["--config", "xray-28"], 1, "X-rays have no built-in cohort"),
        (["--config", "test-2d-local-dim", "--set", "gradient_cache_chunk=0"], 2, "gradient_cache_chunk"),
    ],
)
def test_what_cannot_be_planned_is_told_at_once(options: list[str], code: int, message: str) -> None:
    done = CliRunner().invoke(app, ["plan", *options])
    assert (done.exit_code, message in done.output) == (code, True), done.output


@pytest.mark.parametrize("source", ["index", "store"])
def test_the_modality_is_that_of_the_index_or_store(
    source: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, calls = str(tmp_path / source), []
    made = CliRunner().invoke(app, ["index", str(pictures), "--modality", "xray", "--out", str(tmp_path / "index")])
    assert made.exit_code == 0, made.output
    if source == "store":
        made = CliRunner().invoke(app, ["preprocess", str(tmp_path / "index"), "--jobs", "2", "--out", data])
        assert made.exit_code == 0, made.output

    def record(config: Any, index: Any, out: Path, options: Any, **_: Any) -> None:
        calls.append((config.modality, index.modality, options.jobs))
        raise UserError("recorded")

    monkeypatch.setattr(pretraining, "pretrain", record)
    monkeypatch.setattr(finetuning, "finetune", record)
    for command in (["pretrain"], ["finetune", "--task", "classification"]):
        arguments = [*command, "--data", data, "--jobs", "3", "--out", str(tmp_path / "run")]
        assert "recorded" in CliRunner().invoke(app, arguments).output
        refused = CliRunner().invoke(app, [*arguments, "--modality", "mri"])
        assert (refused.exit_code, "expected an index of mri images, got xray" in refused.output) == (1, True)
    assert calls == [("xray", "xray", 3)] * 2


@pytest.mark.parametrize("command", ["pretrain", "finetune", "plan", "preprocess"])
def test_the_modality_of_images_without_an_index_is_required(command: str, pictures: Path, tmp_path: Path) -> None:
    arguments = {"preprocess": [str(pictures)], "finetune": ["--task", "classification", "--data", str(pictures)]}
    words = [command, *arguments.get(command, ["--data", str(pictures)]), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, words)
    assert (refused.exit_code, "--modality: mri or xray is required" in refused.output) == (2, True), refused.output


@pytest.mark.parametrize("command", ["pretrain", "finetune", "preprocess"])
def test_a_configuration_of_another_modality_is_refused(command: str, pictures: Path, tmp_path: Path) -> None:
    config = "xray-28-classification" if command == "finetune" else "xray-28"
    arguments = {"preprocess": [str(pictures)], "finetune": ["--task", "classification", "--data", str(pictures)]}
    words = [command, *arguments.get(command, ["--data", str(pictures)]), "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*words, "--config", config, "--modality", "mri"])
    assert (refused.exit_code, "this configuration is for xray" in refused.output) == (1, True), refused.output


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--labelled", "0"], "--labelled: expected at least 1 image"), (["--label-fraction", "5"], "--label-fraction:")],
)
def test_a_label_budget_out_of_range_is_rejected_before_the_images_are_indexed(
    options: list[str], message: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.data.source.open_source", lambda *_, **__: pytest.fail("an image was read"))
    out = tmp_path / "run"
    arguments = ["--task", "classification", "--modality", "xray", "--encoder", "none", "--data", str(pictures)]
    rejected = CliRunner().invoke(app, ["finetune", *arguments, "--out", str(out), *options])
    assert (rejected.exit_code, message in rejected.output) == (2, True), rejected.output
    assert not out.exists()
