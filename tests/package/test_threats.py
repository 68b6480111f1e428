"""What a hostile package might try, beside what the tests of each module show; see docs/concepts/threat-model.md."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import medim
from medim import integrity
from medim.cli import app
from medim.export.export import export
from medim.files import read_json, write_json
from medim.inference.ood import COUNT_NAMES, FEATURE_GROUPS, GaussianModel, OODDetector
from medim.package.contract import GOLDEN
from medim.package.model_card import CARD_FILE
from medim.package.package import Package, PackageError, load_package, verify_package, write_sums
from tests.export.packages import make_run
from tests.test_signing import write_keys

REPOSITORY = Path(__file__).resolve().parents[2]
Copy = Callable[[str], Path]


@pytest.mark.parametrize("name", ["medim.json", CARD_FILE])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "1e999999", '"\\ud800"', "{", "\xff"])
def test_json_that_is_too_deep_or_none_is_refused(copy_of: Copy, name: str, text: str) -> None:
    folder = copy_of("classifier")
    (folder / name).write_bytes(text.encode("latin-1"))
    write_sums(folder)
    with pytest.raises(PackageError) as raised:
        verify_package(folder)
    assert raised.value.exit_code == 3
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("field", ["name", "classes", "architecture"])
def test_a_hostile_name_in_a_contract_reaches_no_path_and_no_terminal(copy_of: Copy, field: str) -> None:
    folder = copy_of("classifier")
    content = read_json(folder / "medim.json")
    hostile = {"name": "../../etc/cron.d/x", "classes": ["normal", "\x1b[2Jpneumonia"], "architecture": {"sha256": 1}}
    write_json(folder / "medim.json", {**content, field: hostile[field]})
    write_sums(folder)
    with pytest.raises(PackageError):
        load_package(folder)


def test_more_files_or_longer_sums_than_a_package_has_are_not_read(
    copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("classifier")
    monkeypatch.setattr(integrity, "MAX_FILES", 5)
    with pytest.raises(PackageError, match="at most 5 files"):
        load_package(folder)
    monkeypatch.undo()
    monkeypatch.setattr(integrity, "MAX_SUMS_BYTES", 100)
    with pytest.raises(PackageError, match="at most 100 bytes"):
        load_package(folder)
    monkeypatch.undo()
    monkeypatch.setattr(integrity, "MAX_TEXT_BYTES", 100)
    with pytest.raises(PackageError, match="at most 100 bytes"):
        load_package(folder)


def reference(features: int) -> OODDetector:
    """Statistics of nobody."""
    sides = zip(FEATURE_GROUPS, (features, 12, 9), strict=True)
    parts = {name: GaussianModel(np.zeros(n), np.ones(n), np.eye(n), 1.0) for name, n in sides}
    return OODDetector(parts, dict.fromkeys(COUNT_NAMES, 20), "normal")


@pytest.mark.usefixtures("same_graph", "short_gates")
def test_statistics_of_another_detector_with_recomputed_sums_are_found_by_the_contract(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", "classifier")
    made = reference(int(packages["classifier"].contract.signature.outputs[-1].shape[1]))
    (run / "model" / "reference.safetensors").write_bytes(made.dump())
    folder = export(run, tmp_path / "package").folder
    assert "out-of-distribution detector" in [check.name for check in verify_package(folder)]
    blind = replace(
        made, gaussians={name: replace(part, limit=1e9) for name, part in made.gaussians.items()}
    )  # flags nothing
    (folder / "models" / "reference.safetensors").write_bytes(blind.dump())
    write_sums(folder)
    with pytest.raises(PackageError, match=r"reference\.safetensors: the sha256 differs from that in medim\.json"):
        verify_package(folder)


def encode_safetensors(dtype: str, shape: list[int], data: bytes) -> bytes:
    """A safetensors file with one array, which its header describes."""
    header = json.dumps({"image": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


HOSTILE_ARRAYS = {
    "nothing": b"",
    "a pickle": pickle.dumps([1.0]),
    "a header of a terabyte": (1 << 40).to_bytes(8, "little") + b"{}",
    "a shape of a terabyte": encode_safetensors("F32", [1 << 38], bytes(4)),
    "a shape that overflows": encode_safetensors("F32", [1 << 62, 4], bytes(4)),
    "Python objects": encode_safetensors("O", [4], bytes(4)),
    "a type that numpy does not have": encode_safetensors("BF16", [2], bytes(4)),
    "other arrays": encode_safetensors("F32", [1], bytes(4)),
}


@pytest.mark.parametrize("content", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_hostile_arrays_are_refused_before_memory_is_allocated(copy_of: Copy, content: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        OODDetector.parse(content)
    folder = copy_of("classifier")
    (folder / GOLDEN).write_bytes(content)
    write_sums(folder)
    with pytest.raises(PackageError, match="golden input cannot be run") as raised:
        verify_package(folder)
    assert raised.value.exit_code == 3


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self.marker, "w")


WATCHED = """
import json, os, sys
from pathlib import Path
package, encoder, series, picture, out = map(Path, sys.argv[1:6])
seen = []

def hook(event, arguments):
    if event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        seen.append([event, repr(arguments)[:200]])
    if event.startswith("socket.") and event != "socket.gethostname":
        seen.append([event, repr(arguments)[:200]])
    if event == "subprocess.Popen" and arguments[0] != sys.executable:
        seen.append([event, repr(arguments[:2])[:200]])
    if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        seen.append(["write", arguments[0]])

from medim import load_package
from medim.package.package import verify_package
from medim.predict.embed import embed_images
from medim.predict.predict import predict
import onnxruntime, scipy.ndimage, highdicom
sys.addaudithook(hook)
verify_package(package)
verify_package(encoder)
predict(load_package(package), series, out / "nifti")
predict(load_package(package), series, out / "dicom", output_format="dicom")
embed_images(load_package(encoder), picture, out / "features.npz")
print(json.dumps(seen))
"""


def test_nothing_is_unpickled_run_connected_or_written_elsewhere(
    copy_of: Copy, shared_data: Path, tmp_path: Path
) -> None:
    folder, encoder, marker = copy_of("segmenter"), copy_of("encoder"), tmp_path / "it-was-unpickled"
    for package in (folder, encoder):
        (package / "models" / "model.pt").write_bytes(pickle.dumps(Bomb(marker)))
        (package / "configs" / "inference.json").write_text(json.dumps({"network": "$__import__('os').system('true')"}))
        write_sums(package)
    pickle.loads(pickle.dumps(Bomb(tmp_path / "bombs-work"))).close()
    assert (tmp_path / "bombs-work").exists()
    np.save(tmp_path / "picture.npy", np.arange(32 * 32, dtype=np.uint8).reshape(32, 32))
    out = tmp_path / "out"
    out.mkdir()
    series = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume"
    command = [sys.executable, "-c", WATCHED, folder, encoder, series, tmp_path / "picture.npy", out]
    root = Path(medim.__file__).parents[1]
    cache = tmp_path / "cache"
    own = {**os.environ, "MEDIM_CACHE": str(cache)}
    ran = subprocess.run(list(map(str, command)), cwd=root, env=own, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    seen = json.loads(ran.stdout.splitlines()[-1])
    writes = [place for event, place in seen if event == "write"]
    assert writes, "the hook hears nothing"
    allowed = (out, cache, Path("/dev/null"))
    assert [place for place in writes if not any(Path(place).resolve().is_relative_to(own) for own in allowed)] == []
    assert [event for event in seen if event[0] != "write"] == []
    assert not marker.exists()


def test_the_page_has_a_row_a_threat_and_each_names_tests_that_are_there() -> None:
    page = (REPOSITORY / "docs" / "concepts" / "threat-model.md").read_text()
    tables = re.findall(r"^\| threat .*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    rows = [line for table in tables for line in table.splitlines()]
    assert len(rows) >= 20
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.rsplit(" | ", 1)[-1])
        assert named, row
        for path, name in named:
            assert re.search(rf"^ *def {name}\(", (REPOSITORY / "tests" / path).read_text(), re.MULTILINE), name


CHANGES: dict[str, Callable[[Path], object]] = {
    "preprocessing": lambda folder: edit_architecture(folder, "preprocessing", []),
    "classes": lambda folder: edit_architecture(folder, "classes", ["pneumonia", "normal"]),
    "graph": lambda folder: (folder / "models" / "model.onnx").write_bytes(b"other"),
    "missing file": lambda folder: (folder / "parity" / "report.json").unlink(),
}


def edit_architecture(folder: Path, key: str, value: object) -> None:
    """Change one key of the architecture in the contract of a package."""
    content = read_json(folder / "medim.json")
    content["architecture"][key] = value
    write_json(folder / "medim.json", content)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("command", ["finetune", "probe", "evaluate", "embed", "predict", "study"])
def test_a_changed_package_is_exit_code_3_for_every_command_that_reads_weights(
    copy_of: Copy, tmp_path: Path, command: str, change: str
) -> None:
    folder = copy_of("classifier" if command in {"evaluate", "predict"} else "encoder")
    out = str(tmp_path / "out")
    arguments = {
        "finetune": ["--task", "classification", "--encoder", str(folder), "--labelled", "2", "--out", out],
        "study": ["--task", "classification", "--encoder", f"a={folder}", "--labelled", "2", "--out", out],
        "probe": [str(folder), "--out", out],
        "evaluate": [str(folder), "--out", out],
        "embed": [str(folder), str(tmp_path), "--out", f"{out}.npz"],
        "predict": [str(folder), str(tmp_path), "--out", out],
    }[command]
    CHANGES[change](folder)
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 3, result.output
    assert not Path(out).exists()


@pytest.mark.parametrize("command", ["finetune", "probe", "evaluate"])
def test_a_package_of_another_signer_is_not_used_by_a_command_with_a_public_key(
    copy_of: Copy, tmp_path: Path, command: str
) -> None:
    _, public = write_keys(tmp_path, "ours")
    folder = copy_of("classifier" if command == "evaluate" else "encoder")
    arguments = [str(folder)] if command != "finetune" else ["--task", "classification", "--encoder", str(folder)]
    options = ["--out", str(tmp_path / "out"), "--public-key", str(public)]
    assert CliRunner().invoke(app, [command, *arguments, *options]).exit_code == 3
    arguments[-1] = str(tmp_path)
    assert CliRunner().invoke(app, [command, *arguments, *options]).exit_code == 2
