"""Lines that the commands around packages and runs print."""

from __future__ import annotations

from pathlib import Path

import pytest

from medim.cli.package import _format_gates
from medim.cli.training import _check_summary, _suggest_comparison
from medim.export.export import _open_package_folder
from medim.package.gate import gate_result, skip_gate
from medim.package.label_codes import read_label_codes
from medim.types import UserError


def test_gates_are_counted_and_those_not_run_have_their_reason() -> None:
    gates = {"P0": gate_result(0, 1), "P8 DICOM": skip_gate("no label codes")}
    assert _format_gates(gates) == "1 of 2 passed, 1 not run (P8 DICOM: no label codes)"
    assert _format_gates({"P0": gates["P0"]}) == "1 of 1 passed"


def test_a_report_is_suggested_if_there_are_other_runs(tmp_path: Path) -> None:
    (tmp_path / "twin").mkdir()
    assert _suggest_comparison(tmp_path / "twin") == {}
    (tmp_path / "twin" / "summary.json").touch()
    assert _suggest_comparison(tmp_path / "twin") == {}, "the run itself"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").touch()
    assert _suggest_comparison(tmp_path / "twin") == {"compare with other runs": f"medim report {tmp_path}"}


def test_misspelt_label_codes_are_answered_by_the_shipped_name() -> None:
    with pytest.raises(UserError, match=r"--label-codes hippocamp: no such file\. Did you mean 'hippocampus'\?"):
        read_label_codes("hippocamp", ["Anterior"], "segmenter")


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_exported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"package: cannot be written \(.*\)\. Choose another --out"),
        _open_package_folder(tmp_path / "file" / "package", overwrite=False),
    ):
        pytest.fail("the export was begun")


def test_a_damaged_summary_of_a_finished_run_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"summary\.json: expected the summary of a finished run, which is damaged"),
        _check_summary(tmp_path, is_resumed=True),
    ):
        raise KeyError("verdict")
    with pytest.raises(KeyError), _check_summary(tmp_path, is_resumed=False):
        raise KeyError("verdict")
