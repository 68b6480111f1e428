"""A hospital's export with something planted in every attribute that may tell who, when or where, taken all the way.

Whatever medim writes or says on the way from files to a package, a prediction and a report is searched for it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from pydicom.datadict import DicomDictionary
from typer.testing import CliRunner

from medim.cli import app
from medim.config import FinetuneConfig, PretrainConfig, dump_config
from tests.data.synthetic import write_series
from tests.identity_harness import build_configs, list_texts, run_trees
from tests.training.conftest import *  # noqa: F403  (its fixtures)

WORD, DATE, ROOT = "Zzyzx", "19371123", "1.2.826.0.31415"
TRACES = (b"zzyzx", b"quillon", b"19371123", b"1937-11-23", b"0.31415")
TEXTS, UNIQUE, LONG = {"PN", "LO", "SH"}, {"UI"}, {"LT", "ST", "UT", "AE"}
KNOWN = {  # what the reader judges an image by, or is a fact of the machine
    "SOPClassUID", "SOPInstanceUID", "Manufacturer", "ManufacturerModelName", "MediaStorageSOPClassUID",
    "MediaStorageSOPInstanceUID", "TransferSyntaxUID", "PixelSpacingCalibrationType",
}  # fmt: skip


def planted(subject: int) -> dict[str, str]:
    """A value for every attribute of the standard that can hold a name, a number, a date or a UID of somebody."""
    values = {}
    for tag, (vr, _, _, retired, keyword) in DicomDictionary.items():
        group = tag >> 16
        if not keyword or retired or keyword in KNOWN or group in {0x0000, 0x0002, 0xFFFE} or group > 0x5000:
            continue
        if vr == "PN":
            values[keyword] = f"{WORD}{subject}^Quillon"
        elif vr in TEXTS | LONG:
            values[keyword] = f"{WORD}{subject}{tag:X}"[:16]
        elif vr == "DA":
            values[keyword] = DATE
        elif vr == "DT":
            values[keyword] = f"{DATE}101500"
        elif vr in UNIQUE:
            values[keyword] = f"{ROOT}.{subject}.{tag}"
    return values


def list_tracked_commands(folder: Path) -> set[str]:
    """The commands with finished runs in the MLflow database of a folder."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiments = {e.experiment_id: e.name for e in client.search_experiments() if e.name.startswith("medim-")}
    runs = client.search_runs(list(experiments), "attributes.status = 'FINISHED'")
    return {experiments[run.info.experiment_id].removeprefix("medim-") for run in runs}


@pytest.fixture
def hospital(tmp_path: Path) -> Path:
    """Ten patients with a series each; folders and files bear their names, IDs and UIDs."""
    root, rng = tmp_path / f"{WORD}0 Quillon", np.random.default_rng(0)
    rows = ["subject,label"]
    for subject in range(10):
        tags = planted(subject)
        folder = root / tags["PatientID"] / DATE / tags["SeriesInstanceUID"]
        each = [{"SOPInstanceUID": f"{ROOT}.{subject}.9.{k}"} for k in range(16)]
        slices = rng.integers(0, 1000, (16, 24, 16)).astype(np.float32)
        for k, path in enumerate(write_series(folder, slices, gap=1.0, each=each, **tags)):
            path.rename(folder / f"{each[k]['SOPInstanceUID']}_{WORD}{subject}-Quillon.dcm")
        rows.append(f"{tags['PatientID']},{'ab'[subject % 2]}")
    (root / f"{WORD}3.txt").write_text("no image")
    (tmp_path / "labels.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.mark.slow
def test_nothing_that_medim_writes_or_says_tells_who_when_or_where(
    hospital: Path,
    tmp_path: Path,
    pretrain_config: PretrainConfig,
    finetune_config: FinetuneConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    monkeypatch.setenv("MEDIM_CACHE", str(out / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{out / 'mlflow.db'}")
    caplog.set_level(logging.DEBUG)
    (out / "pretrain.yaml").write_text(dump_config(pretrain_config))
    head = {"task": "classification", "decoder": None, "head": {"name": "classification"}}
    classify = finetune_config.model_copy(update={**head, "inference": {"mode": "whole"}})
    (out / "finetune.yaml").write_text(dump_config(classify))
    labels, series = str(tmp_path / "labels.csv"), str(next(hospital.glob("*/*/*")))
    data, told = ["--data", str(hospital), "--labels", labels, "--where", f"subject!={WORD}0 and path!=*Quillon*"], ""
    assert all(
        trace in b"".join(list_texts(next(hospital.rglob("*.dcm")))).lower() for trace in TRACES if b"-" not in trace
    )
    for line in (
        ["index", str(hospital), "--modality", "mri", "--labels", labels, "--out", "index"],
        ["preprocess", "index", "--modality", "mri", "--config", "pretrain.yaml", "--out", "store"],
        ["pretrain", "--modality", "mri", "--data", "store", "--config", "pretrain.yaml", "--out", "run"],
        [
            "finetune",
            "--task",
            "classification",
            *data,
            "--encoder",
            "run",
            "--config",
            "finetune.yaml",
            "--out",
            "model",
        ],
        ["evaluate", "model", *data, "--split", "all", "--out", "measured"],
        ["export", "model", "--out", "package", "--register", "classifier"],
        ["export", "run", "--out", "encoder-package"],
        ["predict", "package", series, "--out", "predicted"],
        ["embed", "encoder-package", series, "--out", "features.csv"],
        ["report", "index"],
        ["report", "store"],
        ["report", "model"],
        ["report", "measured"],
    ):
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, f"{line}: {done.output}"
        told += done.output
    assert list_tracked_commands(out) == {"pretrain", "finetune", "evaluate", "export", "predict"}
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 60
    found = {
        f"{path.relative_to(out)}: {trace.decode()}"
        for path in files
        for text in list_texts(path)
        for trace in TRACES
        if trace in text.lower()
    }
    assert found == set()
    assert [trace for trace in TRACES if trace in (told + caplog.text).lower().encode()] == []


@pytest.mark.slow
@pytest.mark.parametrize("tree", ["NIfTI", "BIDS", "PNG, many images", "npz", "DICOM, de-identified"])
def test_no_byte_of_any_output_names_a_person_of_a_tree_that_is_named_after_its_patients(
    tree: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for outcome in run_trees(tmp_path, build_configs(), [tree])[tree]:
        assert bool(outcome.exit_code) == outcome.command.fails, f"{outcome.command.words}: {outcome.text}"
        assert outcome.hits == set(), outcome.command.words
    if tree == "NIfTI":  # all commands
        commands = {"pretrain", "finetune", "evaluate", "probe", "study", "export", "predict"}
        assert list_tracked_commands(tmp_path / "out0") == commands
