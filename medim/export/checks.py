"""What must hold before a package exists: each gate measures one thing and says what it allows."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medim.data.preprocessing.steps import to_native
from medim.export.privacy_scan import find_identifying_strings, text_parts
from medim.inference.network import PredictFn
from medim.package.contract import Contract
from medim.package.gate import GateResult, gate_result, skip_gate
from medim.package.golden import LOGITS_TOLERANCE, MAX_VOXEL_FRACTION, GoldenInput
from medim.types import Array, UserError

RANDOM_TOLERANCE, LOW_CONTRAST_TOLERANCE = (
    1e-4,
    1e-2,
)  # largest difference of outputs, over their size where that is above 1
MAX_FLIP_FRACTION = 1e-4  # largest part of voxels with another class, on inputs with little contrast
TIE_TOLERANCE = 1e-5  # two classes nearer than this (over the size) are a tie, which rounding decides


def check_weights_identical(package_arrays: Mapping[str, Array], run_arrays: Mapping[str, Array]) -> GateResult:
    """The tensors of the package are those of the run, bit by bit."""
    different_keys = [
        key
        for key in sorted(package_arrays.keys() | run_arrays.keys())
        if not _arrays_equal(package_arrays.get(key), run_arrays.get(key))
    ]
    return gate_result(len(different_keys), 0, tensors=len(run_arrays), different=different_keys[:5])


def check_random_inputs(
    ort: PredictFn, torch: PredictFn, channels: int, shapes: Sequence[tuple[int, ...]]
) -> GateResult:
    """N(0, 1) at sizes and batch sizes that the tracer never saw."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((n, channels, *shape)).astype(np.float32) for shape in shapes for n in (1, 3)]
    return _compare_outputs(ort, torch, inputs, allowed=RANDOM_TOLERANCE, max_flip_fraction=0.0)


def check_low_contrast(ort: PredictFn, reference: PredictFn, channels: int, shape: tuple[int, ...]) -> GateResult:
    """Zeros, a constant, one bright corner, a large offset: where a norm divides by next to nothing.

    Args:
        ort: the network under ONNX Runtime.
        reference: under torch in float64, because torch's own float32 is no reference here.
        channels: of the input.
        shape: its grid.
    """
    zeros = np.zeros((1, channels, *shape), np.float32)
    corner = zeros.copy()
    corner[(slice(None), slice(None), *[slice(4)] * len(shape))] = 1
    offset = (5000 + np.random.default_rng(1).standard_normal(zeros.shape)).astype(np.float32)
    return _compare_outputs(
        ort,
        reference,
        [zeros, zeros - np.float32(0.7), corner, offset],
        allowed=LOW_CONTRAST_TOLERANCE,
        max_flip_fraction=MAX_FLIP_FRACTION,
    )


def check_invalid_shapes_rejected(ort: PredictFn, shapes: Sequence[tuple[int, ...]]) -> GateResult:
    """Inputs outside the contract raise; `measured` counts those that were answered."""
    runnable_shapes = []
    for shape in shapes:
        try:
            ort(np.zeros(shape, np.float32))
        except UserError:
            continue
        runnable_shapes.append(list(shape))
    return gate_result(len(runnable_shapes), 0, refused=len(shapes) - len(runnable_shapes), answered=runnable_shapes)


def check_phantom_answer(golden: GoldenInput, ort: PredictFn, contract: Contract) -> GateResult:
    """From image to answer on the file's own grid, ONNX Runtime against the torch answer in `golden`."""
    difference = golden.compare_run(ort, contract)
    counts = {"voxels": difference.voxels, "of": difference.voxel_count, "allowed_part": MAX_VOXEL_FRACTION}
    return gate_result(_round_measure(difference.logits), LOGITS_TOLERANCE, ok=difference.is_small, **counts)


def check_privacy(
    folder: Path, words: set[str], own_text: str, text_of: Mapping[str, Callable[[bytes], bytes]]
) -> GateResult:
    """No absolute path, user or host name in any file; `measured` counts the findings.

    Args:
        folder: the package.
        words: see `machine_words`.
        own_text: medim's own vocabulary, which is nobody's secret.
        text_of: for a file suffix, a function that takes away what cannot hold text.
    """
    findings: dict[str, list[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        extract_text = text_of.get(path.suffix)
        for part, text in [(name, extract_text(data))] if extract_text else text_parts(name, data):
            hits = find_identifying_strings(text, words, own_text=own_text)
            if hits:
                findings[part] = hits
    return gate_result(sum(map(len, findings.values())), 0, found=findings)


def _compare_outputs(
    ort: PredictFn, reference: PredictFn, inputs: Sequence[Array], *, allowed: float, max_flip_fraction: float
) -> GateResult:
    """Largest difference over the outputs' size, and how many voxels (or images) change class but for ties."""
    worst, flip_count, tie_count, voxels = 0.0, 0, 0, 0
    for image in inputs:
        actual, expected = ort(image).astype(np.float64), reference(image).astype(np.float64)
        size = max(1.0, float(np.abs(expected).max()))
        gap = float(np.abs(actual - expected).max()) / size
        worst = max(worst, gap if np.isfinite(gap) else float("inf"))
        sorted_outputs = np.sort(expected, axis=1)
        tie = sorted_outputs[:, -1] - sorted_outputs[:, max(-2, -expected.shape[1])] < TIE_TOLERANCE * size
        differs = actual.argmax(1) != expected.argmax(1)
        flip_count += int((differs & ~tie).sum())
        tie_count += int((differs & tie).sum())
        voxels += tie.size
    counts = {
        "flips": flip_count,
        "flips_at_ties": tie_count,
        "of": voxels,
        "inputs": [list(image.shape) for image in inputs],
    }
    return gate_result(
        _round_measure(worst), allowed, ok=worst <= allowed and flip_count <= max_flip_fraction * voxels, **counts
    )


def _arrays_equal(a: Array | None, b: Array | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape


def _round_measure(value: float) -> float:
    return float(f"{value:.2e}") if np.isfinite(value) else 1e30


def check_dicom_answers(golden: GoldenInput, contract: Contract) -> dict[str, GateResult]:
    """A segmenter's answer in DICOM: every class, on the phantom's oblique grid, written and read back.

    Args:
        golden: the phantom.
        contract: with label codes.

    Returns:
        two gates: voxels that read back otherwise, and what dciodvfy calls an error (`not run` where it is missing).
    """
    from medim.export.dicom_phantom import make_phantom_source
    from medim.predict.dicom.equipment import Equipment
    from medim.predict.dicom.segmentation import build_segmentation, read_frame_labels, read_segmentation
    from medim.predict.dicom.structured_report import build_volumes_report
    from medim.predict.dicom.writer import save_dicom

    image = to_native(golden.volume.array[:1], golden.volume)[0]
    classes = len(contract.labels)
    edges = np.quantile(image[image > image.min()], np.linspace(0.2, 0.9, classes))
    source, equipment = make_phantom_source(golden.volume), Equipment(contract, "0" * 64)
    frames = source.frames(np.searchsorted(edges, image).astype(np.uint8))
    seg_dataset = build_segmentation(frames, source, equipment)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("seg.dcm", "sr.dcm")]
        save_dicom(paths[0], seg_dataset)
        save_dicom(paths[1], build_volumes_report(seg_dataset, [1.0] * classes, source, equipment))
        wrong_voxels = int((read_frame_labels(read_segmentation(paths[0]), source) != frames).sum())
        errors = _run_dciodvfy(paths)
    return {
        "DICOM segmentation, read back": gate_result(wrong_voxels, 0, of=frames.size),
        "DICOM answers, dciodvfy": errors,
    }


def _run_dciodvfy(paths: Sequence[Path]) -> GateResult:
    """Errors by David Clunie's checker, of dicom3tools."""
    if shutil.which("dciodvfy") is None:
        return skip_gate("dciodvfy is not installed")
    lines: list[str] = []
    for path in paths:
        process = subprocess.run(["dciodvfy", path.name], cwd=path.parent, capture_output=True, check=False, timeout=60)
        lines += (process.stdout + process.stderr).decode("utf-8", "replace").splitlines()
    if not lines:  # it names at least what it took the object for
        return skip_gate("dciodvfy ended without a word")
    errors = [line for line in lines if line.startswith("Error")]
    return gate_result(len(errors), 0, errors=errors[:5])
