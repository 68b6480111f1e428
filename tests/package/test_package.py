from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch

import medim
from medim.data.contamination import TrainingHistory, load_training_history
from medim.evaluation.evaluate import open_encoder, open_network
from medim.export import checks, gates
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.files import json_sha256, read_json, write_json
from medim.models.serialization import load_encoder, load_model
from medim.package.contract import parse_contract
from medim.package.gate import gate_result
from medim.package.golden import make_phantom
from medim.package.package import Package, PackageError, load_package, verify_package, write_sums
from medim.types import Array, UserError
from tests.export.packages import PLANTED, make_run

KINDS = ("segmenter", "classifier", "encoder")
FILES = {
    "LICENSE",
    "MODEL_CARD.md",
    "SHA256SUMS",
    "configs/inference.json",
    "configs/logging.conf",
    "configs/metadata.json",
    "medim.json",
    "model_card.json",
    "models/model.onnx",
    "models/model.pt",
    "models/model.safetensors",
    "parity/golden.safetensors",
    "parity/report.json",
    "runtime/requirements.lock",
    "sbom.cdx.json",
}


@pytest.fixture
def copied(packages: dict[str, Package], tmp_path: Path) -> Path:
    return Path(shutil.copytree(packages["encoder"].folder, tmp_path / "package"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_package_is_one_folder_of_known_files_and_nothing_is_left_beside_it(packages: dict[str, Package]) -> None:
    for package in packages.values():
        assert files_of(package.folder).keys() == FILES
    beside = {path.name for path in packages["encoder"].folder.parent.iterdir()}
    assert beside == set(KINDS)


@pytest.mark.usefixtures("short_gates", "same_graph")
def test_a_package_carries_what_its_weights_have_seen_under_its_sums(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "classifier")
    seen = TrainingHistory().extended("pretrain", [("a" * 32, "s-1")]).extended("finetune", [("b" * 32, "s-2")])
    seen.write(run / "model")
    one, two = (export(run, tmp_path / name) for name in ("one", "two"))
    assert one.sha256 == two.sha256
    assert "fingerprints.json" in one.sums
    assert load_training_history(one.folder) == seen
    assert {check.verdict for check in verify_package(one.folder)} == {"pass", "not run"}
    (one.folder / "fingerprints.json").unlink()
    with pytest.raises(PackageError, match=r"missing: \['fingerprints\.json'\]"):
        load_package(one.folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_verifies_itself_with_its_golden_input(packages: dict[str, Package], kind: str) -> None:
    checks = verify_package(packages[kind].folder)
    assert [check.name for check in checks] == ["signature", "files", "contract", "card", "network", "golden"]
    assert [check.verdict for check in checks] == ["not run", *["pass"] * 5]


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_answers_as_the_run_does_under_torch(
    packages: dict[str, Package], runs: dict[str, Path], kind: str
) -> None:
    package = packages[kind]
    network = open_encoder(runs[kind]) if kind == "encoder" else open_network(runs[kind])[0]
    shape = (22, 30, 25) if kind == "segmenter" else (41, 37)
    image = make_phantom(shape, package.contract.preprocess, 1, seed=3)
    ours, theirs = package(image), network(image)
    if kind == "segmenter":
        assert ours.shape == image.shape
        assert len(np.unique(ours)) > 1
        assert (ours != theirs).mean() < 1e-4
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.abs(ours).max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_of_a_package_load_into_plain_torch_and_are_those_of_the_run(
    packages: dict[str, Package], runs: dict[str, Path], kind: str
) -> None:
    ours, theirs = load_encoder(packages[kind].folder).state_dict(), load_encoder(runs[kind]).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_network_takes_any_batch_and_any_size_that_its_strides_divide(
    packages: dict[str, Package], runs: dict[str, Path]
) -> None:
    model, _ = load_model(runs["segmenter"])
    image = np.random.default_rng(5).standard_normal((2, 1, 10, 28, 6)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(packages["segmenter"].run(image), want, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("segmenter", (1, 1, 11, 28, 6)),
        ("segmenter", (1, 2, 10, 28, 6)),
        ("segmenter", (1, 1, 28, 6)),
        ("classifier", (1, 1, 28, 32)),
    ],
)
def test_an_input_outside_the_contract_is_refused(
    packages: dict[str, Package], kind: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(UserError, match="expected an input"):
        packages[kind].run(np.zeros(shape, np.float32))


@pytest.mark.usefixtures("short_gates")
def test_exporting_a_moved_run_elsewhere_gives_the_same_bytes(
    packages: dict[str, Package], place: Path, tmp_path: Path
) -> None:
    moved = make_run(tmp_path / "elsewhere", "encoder")
    again = export(moved, tmp_path / "again" / "package")
    assert files_of(again.folder) == files_of(packages["encoder"].folder)


def test_no_file_of_any_package_holds_a_path_or_a_name(packages: dict[str, Package], secrets: list[bytes]) -> None:
    assert PLANTED in str(packages["encoder"].folder)
    for package in packages.values():
        for name, data in files_of(package.folder).items():
            assert [secret for secret in secrets if secret in data] == [], name


def test_the_contract_says_what_goes_in_and_comes_out(packages: dict[str, Package]) -> None:
    contract = packages["encoder"].contract
    assert [output.name for output in contract.signature.outputs] == ["summary", "map_0", "map_1", "watched"]
    assert contract.signature.outputs[2].shape == ("batch", 8, "H/2", "W/2")
    assert contract.preprocess_sha256 == json_sha256([{"op": "normalise"}])
    assert packages["classifier"].contract.signature.inputs[0].shape == ("batch", 1, 28, 28)
    assert packages["segmenter"].contract.classes == ("anterior", "posterior")
    assert "not for diagnosis" in contract.not_for


def test_the_report_and_the_card_hold_every_gate_with_its_measure(packages: dict[str, Package]) -> None:
    for package in packages.values():
        report = read_json(package.folder / "parity" / "report.json")["gates"]
        found = dict.fromkeys(name.split()[0] for name in report)
        assert list(found) == [f"P{n}" for n in (0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 10, 11)]
        assert all(gate["measured"] <= gate["allowed"] for gate in report.values() if gate["verdict"] == "pass")
        others = {name: gate for name, gate in report.items() if gate["verdict"] != "pass"}
        assert all((gate["verdict"], bool(gate["why"])) == ("not run", True) for gate in others.values())
        assert read_json(package.folder / "model_card.json")["gates"] == report
        page = (package.folder / "MODEL_CARD.md").read_text()
        assert all(f"| {name} | {gate['verdict']} |" in page for name, gate in report.items())
    three_dimensional = read_json(packages["segmenter"].folder / "parity" / "report.json")["gates"]
    missing = [] if shutil.which("dciodvfy") else ["P8 DICOM answers, dciodvfy"]
    assert [name for name, gate in three_dimensional.items() if gate["verdict"] == "not run"] == missing
    sizes = three_dimensional["P2 ONNX Runtime against torch, unseen sizes"]
    assert {shape[0] for shape in sizes["inputs"]} == {1, 3}
    assert sizes["flips"] == 0


def test_medim_load_package_is_the_way_in(packages: dict[str, Package]) -> None:
    assert medim.load_package(packages["encoder"].folder).contract == packages["encoder"].contract


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_byte_in_any_file_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(data)
    with pytest.raises(PackageError) as raised:
        load_package(copied)
    assert raised.value.exit_code == 3


def _remove(folder: Path) -> None:
    (folder / "MODEL_CARD.md").unlink()


def _add(folder: Path) -> None:
    (folder / "models" / "extra.pt").write_bytes(b"")


def _link(folder: Path) -> None:
    target = folder.parent / "elsewhere.md"
    shutil.move(folder / "MODEL_CARD.md", target)
    (folder / "MODEL_CARD.md").symlink_to(target)


def _link_a_folder(folder: Path) -> None:
    shutil.move(folder / "parity", folder.parent / "parity")
    (folder / "parity").symlink_to(folder.parent / "parity")


def _no_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize("damage", [_remove, _add, _link, _link_a_folder, _no_sums])
def test_a_missing_extra_or_linked_file_is_found(copied: Path, damage: Callable[[Path], None]) -> None:
    damage(copied)
    with pytest.raises(PackageError):
        load_package(copied)


@pytest.mark.parametrize(
    "line", ["{hash}  ../outside", "{hash}  /etc/hostname", "{hash}  medim.json", "no hash at all"]
)
def test_sums_that_name_a_file_outside_or_twice_are_refused(copied: Path, line: str) -> None:
    (copied.parent / "outside").write_bytes(b"x")
    with (copied / "SHA256SUMS").open("a") as file:
        file.write(line.format(hash="0" * 64) + "\n")
    with pytest.raises(PackageError, match="once each"):
        load_package(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("preprocess", [{"op": "normalise", "method": "range"}]),  # not the one whose hash stands beside it
        ("inference", {"mode": "__import__('os').system('true')"}),
        ("kind", "oracle"),
        ("schema_version", 3),
        ("run_me", "$(reboot)"),
        ("classes", ["anterior\n"]),
    ],
)
def test_a_contract_that_is_not_one_is_refused_even_with_recomputed_sums(copied: Path, key: str, value: object) -> None:
    write_json(copied / "medim.json", {**read_json(copied / "medim.json"), key: value})
    write_sums(copied)
    with pytest.raises(PackageError, match=r"medim\.json"):
        load_package(copied)


def test_a_package_of_an_earlier_version_is_refused(copied: Path) -> None:
    (copied / "parity" / "golden.safetensors").rename(copied / "parity" / "golden.npz")
    write_json(copied / "medim.json", {**read_json(copied / "medim.json"), "schema_version": 1})
    write_sums(copied)
    with pytest.raises(PackageError, match="made by an earlier version of medim: export it again") as raised:
        load_package(copied)
    assert "reference.npz, delete that file first" in str(raised.value)
    assert raised.value.exit_code == 3


def test_a_package_without_golden_input_is_refused(copied: Path) -> None:
    (copied / "parity" / "golden.safetensors").unlink()
    write_sums(copied)
    with pytest.raises(PackageError, match=r"the package lacks parity/golden\.safetensors"):
        load_package(copied)


def test_statistics_of_an_earlier_version_stop_the_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "classifier")
    (run / "model" / "reference.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="made by an earlier version of medim"):
        export(run, tmp_path / "package")


def test_a_run_that_was_stopped_before_its_summary_is_not_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "classifier")
    (run / "summary.json").unlink(missing_ok=True)
    (run / ".medim").write_text('{"command": "finetune", "state": "stopped", "process": 1, "files": []}')
    with pytest.raises(UserError, match="stopped before its end"):
        export(run, tmp_path / "package")


def _flat_input(signature: dict[str, Any]) -> None:
    signature["inputs"][0]["shape"] = ["batch"]


def _flat_output(signature: dict[str, Any]) -> None:
    signature["outputs"][-1]["shape"] = ["batch"]


def _no_rule(signature: dict[str, Any]) -> None:
    signature["symbols"].pop("batch")


@pytest.mark.parametrize("spoil", [_flat_input, _flat_output, _no_rule])
def test_a_signature_that_fits_no_image_is_refused_even_with_recomputed_sums(
    copied: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    contract = read_json(copied / "medim.json")
    spoil(contract["signature"])
    write_json(copied / "medim.json", contract)
    write_sums(copied)
    with pytest.raises(PackageError, match=r"medim\.json"):
        load_package(copied)


def test_changed_weights_with_recomputed_sums_are_found_by_the_contract(copied: Path) -> None:
    weights = copied / "models" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    write_sums(copied)
    with pytest.raises(PackageError, match=r"model\.safetensors: the sha256 differs from that in medim\.json"):
        load_package(copied)


def test_another_network_with_recomputed_sums_is_found_by_the_golden_input(
    copied: Path, packages: dict[str, Package]
) -> None:
    graph = copied / "models" / "model.onnx"
    model = onnx.load_model(graph)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(weights).copy()
    changed.flat[0] += 0.01  # one weight of hundreds
    weights.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.float32), weights.name))
    graph.write_bytes(model.SerializeToString())
    write_sums(copied)
    load_package(copied)  # its files agree with each other
    with pytest.raises(PackageError, match="golden"):
        verify_package(copied)


def test_a_graph_that_is_none_is_refused(copied: Path) -> None:
    (copied / "models" / "model.onnx").write_bytes(b"not a graph")
    write_sums(copied)
    with pytest.raises(PackageError, match="cannot load"):
        verify_package(copied)


def test_a_file_that_changes_after_loading_is_not_used(copied: Path) -> None:
    package = load_package(copied)
    (copied / "models" / "model.onnx").write_bytes(b"swapped")
    with pytest.raises(PackageError, match="changed since"):
        package.run(np.zeros((1, 1, 8, 8), np.float32))


@pytest.mark.usefixtures("same_graph", "short_gates")
@pytest.mark.parametrize(
    ("where", "broken", "reason"),
    [
        ((checks, "RANDOM_TOLERANCE"), 0.0, "unseen sizes"),
        ((gates, "offline_error"), lambda *_: "it loaded torch", "it loaded torch"),
        ((gates, "_run_repeat_gate"), lambda *_: gate_result(1, 0, found=["models/model.pt"]), "exported twice"),
        ((checks, "find_identifying_strings"), lambda *_, **__: ["/home/somebody"], "no path, user or host name"),
    ],
)
def test_a_failing_gate_leaves_no_package(
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[Any, str],
    broken: Any,
    reason: str,
) -> None:
    monkeypatch.setattr(*where, broken)
    with pytest.raises(UserError, match=reason):
        export(runs["classifier"], tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_the_second_export_finds_a_file_that_came_out_otherwise(packages: dict[str, Package]) -> None:
    folder = packages["encoder"].folder

    def almost(place: Path) -> None:
        shutil.copytree(folder, place, dirs_exist_ok=True)
        (place / "LICENSE").write_text("another")
        (place / "new").touch()

    assert gates._run_repeat_gate(folder, almost) == gate_result(2, 0, found=["LICENSE", "new"])


@pytest.mark.slow
def test_another_process_with_another_order_of_sets_exports_the_same_bytes(
    packages: dict[str, Package], runs: dict[str, Path], tmp_path: Path
) -> None:
    for seed in ("1", "2"):
        out = tmp_path / seed
        command = [sys.executable, "-m", "medim.cli", "export", str(runs["encoder"]), "--out", str(out)]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True)
        assert files_of(out) == files_of(packages["encoder"].folder)


@pytest.mark.usefixtures("same_graph", "short_gates")
def test_a_path_in_the_spec_stops_the_export(tmp_path: Path) -> None:
    leaky = make_run(tmp_path / "run", "classifier", notes=f"/home/{PLANTED}/scans")
    with pytest.raises(UserError, match="no path, user or host name"):
        export(leaky, tmp_path / "out" / "package")
    named = make_run(tmp_path / "named", "classifier", provenance={"where": f"subject!={PLANTED}"})
    with pytest.raises(UserError, match=r"provenance\.where"):
        export(named, tmp_path / "package-named")
    told = make_run(tmp_path / "told", "classifier", provenance={"parent": f"/data/{PLANTED}"})
    with pytest.raises(UserError, match=r"provenance\.parent"):
        export(told, tmp_path / "out" / "package")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("same_graph", "short_gates")
def test_only_a_package_is_replaced_and_only_where_that_is_asked_for(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "package"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        export(runs["classifier"], out)
    with pytest.raises(UserError, match="replaces only a package"):
        export(runs["classifier"], out, ExportOptions(overwrite=True))
    with pytest.raises(UserError, match="replaces only a package"):
        export(runs["classifier"], runs["classifier"], ExportOptions(overwrite=True))
    assert (out / "mine.txt").read_text() == "keep"
    (out / "mine.txt").rename(out / "SHA256SUMS")
    export(
        runs["classifier"],
        out,
        ExportOptions(overwrite=True, name="chest", version="1.2.3", intended_use="Sorting of films."),
    )
    assert files_of(out).keys() == FILES
    content = json.loads((out / "medim.json").read_text())
    assert (content["name"], content["version"], content["intended_use"]) == ("chest", "1.2.3", "Sorting of films.")


@pytest.mark.parametrize(
    ("part", "remedy"),
    [
        ("model", r"got a fine-tuning run\. Run `medim export .*/run --out PACKAGE`\."),
        ("encoder", r"got a pretraining run\. .*fine-tune it \(`medim finetune --encoder .*/run`\)"),
        ("other", r"found none\. Check the path\."),
    ],
)
def test_a_run_in_place_of_a_package_is_reported_with_the_command_to_export_it(
    part: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / "run" / part).mkdir(parents=True)
    (tmp_path / "run" / part / f"{part}.json").touch()
    with pytest.raises(PackageError, match=f"expected a package.* {remedy}"):
        load_package(tmp_path / "run")


def test_a_folder_that_is_no_run_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a finished run"):
        export(tmp_path, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("same_graph", "short_gates")
def test_the_metrics_of_the_run_stand_in_contract_and_card(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "classifier")
    write_json(run / "summary.json", {"val": {"auroc": {"value": 0.875, "ci_low": 0.8}, "note": "/home/x"}})
    package = export(run, tmp_path / "package")
    assert package.contract.metrics == {"auroc": {"value": 0.875, "ci_low": 0.8}}
    assert (
        "| on the run's validation split: auroc.value | 32 | 0.875 |" in (package.folder / "MODEL_CARD.md").read_text()
    )


def test_gates_count_flips_but_not_ties() -> None:
    def torch(image: Array) -> Array:
        return np.stack([image[:, 0] / 100, np.zeros_like(image[:, 0])], axis=1)  # many voxels near the border

    def close(image: Array) -> Array:
        return torch(image) - np.float32(5e-5) * np.array([1, 0]).reshape(1, 2, 1, 1)

    result = checks.check_random_inputs(close, torch, 1, [(64, 64)])
    assert result["measured"] <= 1e-4
    assert result["flips"] > 0
    assert result["verdict"] == "fail"
    same = checks.check_random_inputs(torch, torch, 1, [(64, 64)])
    assert (same["verdict"], same["measured"]) == ("pass", 0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", ["pneumonia", "normal"], "classes .* differs from .* in `architecture`"),
        ("metrics", {"auroc": float("nan")}, "expected a finite number, got NaN"),
        ("architecture", {}, "expected the key"),
    ],
)
def test_a_contract_that_contradicts_itself_is_refused(
    key: str, value: Any, message: str, packages: dict[str, Package]
) -> None:
    content = json.loads((packages["classifier"].folder / "medim.json").read_text())
    assert parse_contract(json.dumps(content).encode()).classes == ("normal", "pneumonia")
    with pytest.raises(PackageError, match=message):
        parse_contract(json.dumps({**content, key: value}).encode())
