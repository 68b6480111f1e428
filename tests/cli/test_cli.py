from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from medim.cli import app


@pytest.mark.parametrize("option", ["--seed", "--split-seed"])
@pytest.mark.parametrize("value", ["-1", str(2**32)])
def test_a_seed_that_no_generator_takes_is_wrong_usage(option: str, value: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["pretrain", "--modality", "mri", option, value, "--out", str(out)])
    assert result.exit_code == 2
    assert option in result.output
    assert not out.exists()


def test_a_twin_without_the_encoder_it_is_the_twin_of_is_wrong_usage(tmp_path: Path) -> None:
    options = ["--task", "segmentation", "--modality", "mri", "--from-scratch", "--out", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["finetune", *options])
    assert result.exit_code == 2
    assert "--encoder RUN" in result.output


def test_an_index_of_nothing_but_broken_files_says_why_and_leaves_with_4(tmp_path: Path) -> None:
    (tmp_path / "broken.nii.gz").write_text("junk")
    out = tmp_path / "index"
    broken = str(tmp_path / "broken.nii.gz")
    result = CliRunner().invoke(app, ["index", broken, "--modality", "mri", "--out", str(out)])
    assert result.exit_code == 4
    assert "broken.nii.gz,unreadable," in (out / "rejected.csv").read_text()
    assert not (out / "summary.json").exists()


def test_a_store_is_not_written_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "scan.txt").touch()
    result = CliRunner().invoke(app, ["preprocess", str(tmp_path), "--modality", "mri", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "expected a store" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["scan.txt"]
