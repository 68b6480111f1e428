from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medim.cli import app
from medim.export.privacy_scan import find_identifying_strings, identifying_strings, text_parts
from tests.data.synthetic import write_decathlon


@pytest.mark.parametrize(
    "text",
    [
        b"weights from /home/erika/scans/a.nii",
        b'"source": "/srv/site/run"',
        b"C:\\Users\\erika\\scan.dcm",
        b'{"path": "C:\\\\Users\\\\erika\\\\scan.dcm"}',
        b"\\\\server\\share\\scan.dcm",
        b"file:///mnt/pacs/1.dcm",
        b"\x00\x12/tmp/build/x.py\x00",
        b"made by mustermann today",
        b"on ward7-host:22",
    ],
)
def test_paths_and_names_are_found(text: bytes) -> None:
    assert find_identifying_strings(text, {"mustermann", "ward7-host"})


@pytest.mark.parametrize(
    "text",
    [
        b"https://example.org/home/page and a/home/b, ratio 3/4, 1/tmp",
        b"shape H/2, W/2, mri/xray",
        b"mustermanns, 1mustermann",
        b"models/model.onnx",
    ],
)
def test_what_only_looks_like_one_is_not(text: bytes) -> None:
    assert find_identifying_strings(text, {"mustermann"}) == []


def test_a_user_called_like_a_word_of_every_package_is_not_found_by_it() -> None:
    assert find_identifying_strings(b'"kind": "encoder"', {"encoder"}) == ["encoder"]
    assert find_identifying_strings(b'"kind": "encoder"', {"encoder"}, own_text="the encoder of a run") == []


def test_the_words_of_this_machine_hold_the_folders_of_a_run_but_no_word_of_everybody(tmp_path: Path) -> None:
    words = identifying_strings([tmp_path / "run"])
    assert str(tmp_path / "run") in words
    assert not {"root", "localhost", "/", "/tmp"} & words


def test_only_what_can_hold_text_is_read_of_weights_and_archives() -> None:
    header = b'{"a":{"note":"/home/erika/x"}}'
    weights = len(header).to_bytes(8, "little") + header + b"/home/erika/in-the-numbers"
    parts = dict(text_parts("model.safetensors", weights))
    assert parts == {"model.safetensors (header)": header}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data/0", b"/home/erika/in-the-numbers")
        archive.writestr("archive/erika", b"/home/erika/x")
    ((name, text),) = text_parts("model.pt", buffer.getvalue())
    assert name == "model.pt/archive/erika"
    assert find_identifying_strings(text, set()) == ["/home/erika/x"]


@pytest.mark.slow
def test_a_segmenter_trained_and_exported_from_a_folder_with_a_name_in_its_path_holds_it_in_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "Mustermann_Erika"
    data = write_decathlon(site / "data", names=[f"mustermann_{k}" for k in range(6)])
    monkeypatch.chdir(site)
    train = ["finetune", "--task", "segmentation", "--modality", "mri", "--data", str(data), "--encoder", "none"]
    train += ["--set", "max_steps=2", "--set", "batch_size=2", "--set", "encoder.channels=[4, 8, 8]", "--out", "run"]
    for command in (train, ["export", "run", "--out", str(site / "package")]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    files = [path for path in (site / "package").rglob("*") if path.is_file()]
    assert len(files) >= 16
    for path in files:
        content = path.read_bytes()
        parts = [content, *(part for _, part in text_parts(path.name, content))]  # archives as they lie, and unpacked
        for name in (b"mustermann", b"erika", str(tmp_path).encode()):
            assert not [part for part in parts if name in part.lower()], path.name
