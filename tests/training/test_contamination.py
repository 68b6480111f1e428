"""An image that was pretrained on comes back under another name, person, format and slope."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medim.cli import app
from medim.config import PretrainConfig
from medim.data.index.index import build_index
from medim.data.readers import read_volume
from medim.export.export import export
from medim.training.pretrain.run import pretrain
from tests.data.synthetic import noise, write_nifti, write_series
from tests.training.conftest import SHAPE

SLICES = noise(16, 24, 16, seed=100)


@pytest.fixture
def package(pretrain_config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder from another site, pretrained on seven NIfTI files and a DICOM series."""
    source = tmp_path / "there"
    for k in range(7):
        write_nifti(source / f"scan{k}.nii.gz", noise(*SHAPE, seed=k))
    write_series(source / "series", SLICES)
    (source / "labels.csv").write_text("image,split\nscan0,val\nscan1,val\nseries,train\n")
    config = pretrain_config.model_copy(update={"max_steps": 2, "objectives": [pretrain_config.objectives[1]]})
    monkeypatch.setenv("MEDIM_SITE_KEY", "another site")
    pretrain(config, build_index(source, "mri"), tmp_path / "run", store=tmp_path / "store")
    monkeypatch.delenv("MEDIM_SITE_KEY")
    return export(tmp_path / "run", tmp_path / "package").folder


def evaluation_set(folder: Path, *, planted: bool) -> Path:
    """Four labelled images for training and four for validation, one of which may be a copy."""
    rows = ["image,label,split"]
    for k in range(8):
        array, affine = noise(*SHAPE, seed=50 + k), np.eye(4)
        if planted and k == 6:
            write_series(folder.parent / "again", SLICES)
            volume = read_volume(folder.parent / "again")
            array, affine = 0.37 * volume.array[0][::-1] - 20, volume.affine @ np.diag([-1.0, 1, 1, 1])
        write_nifti(folder / f"patient{k}.nii.gz", array.astype(np.float32), affine)
        rows.append(f"patient{k},{'ab'[k % 2]},{'train' if k < 4 else 'val'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_it_is_counted_as_one_image_and_refused_when_strict_with_exit_code_1(
    package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    command = ["finetune", "--task", "classification", "--encoder", str(package), "--set", "max_steps=1"]
    command += ["--set", "batch_size=2", "--device", "cpu"]
    planted = [*command, "--data", str(evaluation_set(tmp_path / "planted", planted=True))]
    done = CliRunner().invoke(app, [*planted, "--out", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    seen = json.loads((tmp_path / "a" / "summary.json").read_text())["contamination"]
    assert seen == {"pretrain": {"images": 1, "subjects": None}, "finetune": {"images": 0, "subjects": 0}}
    assert "1 image, subjects unknown (another site key)" in done.output
    assert "WARNING leakage: 1 of 4 evaluation images (25%) was used in pretraining" in done.output
    assert "8 images of 8 subjects" in done.output
    assert "train 4 subjects (4 images), val 4 subjects (4 images)" in done.output
    assert (tmp_path / "a" / "rejected.csv").read_text().startswith("path,reason,detail")

    refused = CliRunner().invoke(app, [*planted, "--fail-on-contamination", "--out", str(tmp_path / "b")])
    assert refused.exit_code == 1
    assert "--fail-on-contamination allows none" in refused.output
    assert not (tmp_path / "b").exists()

    clean = [*command, "--data", str(evaluation_set(tmp_path / "clean", planted=False)), "--fail-on-contamination"]
    done = CliRunner().invoke(app, [*clean, "--out", str(tmp_path / "c")])
    assert done.exit_code == 0, done.output

    model, data = str(tmp_path / "c"), ["--data", str(tmp_path / "planted"), "--split", "all"]
    refused = CliRunner().invoke(
        app, ["evaluate", model, *data, "--fail-on-contamination", "--out", str(tmp_path / "d")]
    )
    assert refused.exit_code == 1
    assert "seen in pretraining 1 image" in " ".join(refused.output.split())
    assert not (tmp_path / "d" / "metrics.json").exists()
    refused = CliRunner().invoke(
        app, ["probe", str(package), *data[:2], "--fail-on-contamination", "--out", str(tmp_path / "e")]
    )
    assert refused.exit_code == 1
    assert "--fail-on-contamination allows none" in refused.output
