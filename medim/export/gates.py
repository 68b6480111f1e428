"""Run all acceptance gates of a package in order; the measurements are in `medim.export.checks`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from medim.data.preprocessing.steps import STEPS
from medim.export import checks, onnx
from medim.export.builder import ExportedGraph, PackageBuilder
from medim.export.monai_native import check_monai_preprocessing
from medim.export.offline import network_isolation_command, offline_error
from medim.export.orientation import count_misplaced_markers
from medim.export.privacy_scan import identifying_strings
from medim.export.run import FinishedRun
from medim.export.sbom import build_sbom, lock_file
from medim.files import file_sha256
from medim.inference.network import INFERENCES
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.models.model import build_encoder, build_model
from medim.models.ood_features import WithOODFeatures, as_numpy_predictor
from medim.models.serialization import load_weights
from medim.objectives import OBJECTIVES
from medim.package.contract import GOLDEN, RESEARCH_ONLY, Contract
from medim.package.gate import GateResult, gate_result, skip_gate
from medim.package.model_card import CARD_FILE, CARD_PAGE, FIELDS
from medim.tasks import is_dense
from medim.types import Array

PRIVACY_GATE = "P9 no path, user or host name in any file"
OFFLINE_GATE = "P10 verify and answer without a network"
REPEAT_GATE = "P11 exported twice, the same bytes"


def run_network_gates(builder: PackageBuilder) -> dict[str, GateResult]:
    """Run gates P0 to P8, which need the networks: agreement of the graphs with torch, geometry and DICOM output."""
    results = _run_weight_gates(builder.run)
    for onnx_graph in builder.graphs.values():
        results |= {onnx_graph.graph.name + name: gate for name, gate in _run_graph_gates(onnx_graph, builder).items()}
    return results | _run_image_gates(builder)


def run_folder_gates(
    folder: Path, builder: PackageBuilder, private_folders: Sequence[Path], export_again: Callable[[Path], None]
) -> dict[str, GateResult]:
    """Run gates P9 to P11, which need the complete package folder.

    Args:
        folder: the package.
        builder: builder of the package.
        private_folders: folders with names that the package must not contain.
        export_again: function that exports the run again into a given folder.
    """
    words = identifying_strings([*private_folders, folder])
    isolation = network_isolation_command()
    return {
        PRIVACY_GATE: checks.check_privacy(
            folder,
            words,
            _collect_vocabulary(builder),
            {".onnx": onnx.strip_weights},
            dict.fromkeys((CARD_FILE, CARD_PAGE), str(builder.card_answers)),
        ),
        OFFLINE_GATE: NETWORK_ISOLATION_UNAVAILABLE if isolation is None else _run_offline_gate(folder, isolation),
        REPEAT_GATE: _run_repeat_gate(folder, export_again),
    }


def expected_folder_gates() -> dict[str, GateResult]:
    """Build the expected results of `run_folder_gates`.

    They are written to the report and the model card before `run_folder_gates`, because it reads both files.
    """
    offline = gate_result(0, 0) if network_isolation_command() else NETWORK_ISOLATION_UNAVAILABLE
    return {PRIVACY_GATE: gate_result(0, 0, found={}), OFFLINE_GATE: offline, REPEAT_GATE: gate_result(0, 0, found=[])}


NETWORK_ISOLATION_UNAVAILABLE = skip_gate("this machine does not allow `unshare --net`")


def _run_weight_gates(run: FinishedRun) -> dict[str, GateResult]:
    training_modules = sum(module.training for graph in run.graphs for module in graph.network.modules())
    package_network = build_encoder(run.spec) if run.spec.is_encoder else build_model(run.spec)
    load_weights(package_network, run.weights)
    return {
        "P0 network in evaluation mode": gate_result(training_modules, 0),
        "P1 weights are those of the run": checks.check_weights_identical(
            _convert_state_dict(package_network), _convert_state_dict(run.graphs[0].module)
        ),
    }


def _run_graph_gates(onnx_graph: ExportedGraph, builder: PackageBuilder) -> dict[str, GateResult]:
    channels, sizes = builder.contract.in_channels, builder.run.sizes
    shape = sizes.shape
    invalid_shapes = [(1, channels + 1, *shape), (1, channels, *shape, 1)]
    if sizes.fixed or sizes.multiple_of > 1:
        invalid_shapes.append((1, channels, shape[0] + 1, *shape[1:]))
    results = {
        "P2 ONNX Runtime against torch, unseen sizes": checks.check_random_inputs(
            onnx_graph.ort, onnx_graph.graph.run, channels, sizes.untraced_shapes()
        ),
        "P3 ONNX Runtime against float64 torch, little contrast": checks.check_low_contrast(
            onnx_graph.ort, onnx_graph.graph.float64, channels, sizes.untraced_shapes()[0]
        ),
        "P4 sizes outside the contract are refused": checks.check_invalid_shapes_rejected(
            onnx_graph.ort, invalid_shapes
        ),
        "P6 phantom, from image to answer": checks.check_phantom_answer(
            onnx_graph.golden, onnx_graph.ort, builder.contract
        ),
    }
    if isinstance(onnx_graph.graph.network, WithOODFeatures):
        torch_run, ort = as_numpy_predictor(onnx_graph.graph.module), onnx_graph.ort
        results["P2 ONNX Runtime against torch, OOD features"] = checks.check_random_inputs(
            lambda image: ort.predict_with_features(image)[1],
            lambda image: torch_run(image)[1],
            channels,
            sizes.untraced_shapes(),
        )
    return results


def _run_image_gates(builder: PackageBuilder) -> dict[str, GateResult]:
    return {
        "P5 preprocessing against MONAI": check_monai_preprocessing(builder.goldens[GOLDEN].volume, builder.contract),
        "P7 markers of a DICOM phantom, in all directions": _run_orientation_gate(builder.contract),
    } | _run_dicom_gates(builder)


def _run_dicom_gates(builder: PackageBuilder) -> dict[str, GateResult]:
    if not is_dense(builder.contract.kind) or not builder.contract.labels:
        return {"P8 DICOM SEG, written and read back": skip_gate("no label codes: no DICOM output")}
    return {
        f"P8 {name}": gate
        for name, gate in checks.check_dicom_answers(builder.goldens[GOLDEN], builder.contract).items()
    }


def _run_orientation_gate(contract: Contract) -> GateResult:
    if contract.spatial_dims == 2:
        return skip_gate("2D images have no patient coordinates")
    wrong, markers = count_misplaced_markers()
    return gate_result(wrong, 0, of=markers)


def _run_offline_gate(folder: Path, isolation: tuple[str, ...]) -> GateResult:
    reason = offline_error(folder, isolation)
    return gate_result(1, 0, found=reason) if reason else gate_result(0, 0)


def _run_repeat_gate(folder: Path, export_again: Callable[[Path], None]) -> GateResult:
    """Count the files that differ in a second export."""
    with tempfile.TemporaryDirectory() as second_folder:
        export_again(Path(second_folder))
        first_hashes, second_hashes = _hash_files(folder), _hash_files(Path(second_folder))
    different_files = [
        name
        for name in sorted(first_hashes.keys() | second_hashes.keys())
        if first_hashes.get(name) != second_hashes.get(name)
    ]
    return gate_result(len(different_files), 0, found=different_files)


def _hash_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def _convert_state_dict(network: nn.Module) -> dict[str, Array]:
    return {key: value.numpy() for key, value in network.state_dict().items()}


def _collect_vocabulary(builder: PackageBuilder) -> str:
    """Collect the words that every package contains, so that a user name such as "image" is not reported as a leak."""
    words: list[Any] = [Contract.model_json_schema(), FIELDS, RESEARCH_ONLY, *STEPS, *INFERENCES]
    words += [*ENCODERS, *DECODERS, *HEADS, *OBJECTIVES, *CRITICS]
    words += [lock_file().decode(), build_sbom(builder.contract).decode()]
    return " ".join(map(str, [*words, *(key for graph in builder.run.graphs for key in graph.network.state_dict())]))
