from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from medim.deployment.privacy import machine_words, readable, scan


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
    assert scan(text, {"mustermann", "ward7-host"})


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
    assert scan(text, {"mustermann"}) == []


def test_a_user_called_like_a_word_of_every_package_is_not_found_by_it() -> None:
    assert scan(b'"kind": "encoder"', {"encoder"}) == ["encoder"]
    assert scan(b'"kind": "encoder"', {"encoder"}, own="the encoder of a run") == []


def test_the_words_of_this_machine_hold_the_folders_of_a_run_but_no_word_of_everybody(tmp_path: Path) -> None:
    words = machine_words([tmp_path / "run"])
    assert str(tmp_path / "run") in words
    assert not {"root", "localhost", "/", "/tmp"} & words


def test_only_what_can_hold_text_is_read_of_weights_and_archives() -> None:
    header = b'{"a":{"note":"/home/erika/x"}}'
    weights = len(header).to_bytes(8, "little") + header + b"/home/erika/in-the-numbers"
    parts = dict(readable("model.safetensors", weights))
    assert parts == {"model.safetensors (header)": header}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, erika=np.frombuffer(b"/home/erika/x", np.uint8))
    (name, text), *_ = readable("golden.npz", buffer.getvalue())
    assert name == "golden.npz/erika.npy"
    assert scan(text, set()) == ["/home/erika/x"]
