"""Acceptance checks of a package; each returns the measured value with its limit."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medim.data.preprocessing.steps import to_native
from medim.export.privacy_scan import find_identifying_strings, text_parts
from medim.package.contract import Contract
from medim.package.gate import GateResult, gate_result, skip_gate
from medim.package.golden import LOGITS_TOLERANCE, MAX_VOXEL_FRACTION, GoldenInput
from medim.types import Array, PredictFn, UserError

RANDOM_TOLERANCE, LOW_CONTRAST_TOLERANCE = (
    1e-4,
    1e-2,
)  # largest difference of outputs, relative to the largest output if that is above 1
MAX_FLIP_FRACTION = 1e-4  # largest fraction of voxels with another class, for inputs of low contrast
TIE_TOLERANCE = 1e-5  # smaller relative differences of two classes are ties, which depend on rounding


def check_weights_identical(package_arrays: Mapping[str, Array], run_arrays: Mapping[str, Array]) -> GateResult:
    """Check that the tensors of the package are bitwise identical to those of the run."""
    different_keys = [
        key
        for key in sorted(package_arrays.keys() | run_arrays.keys())
        if not _arrays_equal(package_arrays.get(key), run_arrays.get(key))
    ]
    return gate_result(len(different_keys), 0, tensors=len(run_arrays), different=different_keys[:5])


def check_random_inputs(
    ort: PredictFn, torch: PredictFn, channels: int, shapes: Sequence[tuple[int, ...]]
) -> GateResult:
    """Compare outputs for random inputs from N(0, 1), with shapes and batch sizes that were not used for tracing."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((n, channels, *shape)).astype(np.float32) for shape in shapes for n in (1, 3)]
    return _compare_outputs(ort, torch, inputs, allowed=RANDOM_TOLERANCE, max_flip_fraction=0.0)


def check_low_contrast(ort: PredictFn, reference: PredictFn, channels: int, shape: tuple[int, ...]) -> GateResult:
    """Compare outputs for inputs of low contrast: zeros, a constant, one bright corner and a large offset.

    For these inputs, normalisation layers divide by a variance close to 0.

    Args:
        ort: network in ONNX Runtime.
        reference: network in torch with float64 weights, because float32 is not accurate for these inputs.
        channels: number of input channels.
        shape: spatial shape of the input.
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
    """Check that inputs outside the contract are rejected; `measured` is the number of accepted ones."""
    runnable_shapes = []
    for shape in shapes:
        try:
            ort(np.zeros(shape, np.float32))
        except UserError:
            continue
        runnable_shapes.append(list(shape))
    return gate_result(len(runnable_shapes), 0, refused=len(shapes) - len(runnable_shapes), answered=runnable_shapes)


def check_phantom_answer(golden: GoldenInput, ort: PredictFn, contract: Contract) -> GateResult:
    """Compare the prediction of ONNX Runtime for the phantom, on its native grid, with that of torch in `golden`."""
    difference = golden.compare_run(ort, contract)
    counts = {"voxels": difference.voxels, "of": difference.voxel_count, "allowed_part": MAX_VOXEL_FRACTION}
    return gate_result(_round_measure(difference.logits), LOGITS_TOLERANCE, ok=difference.is_small, **counts)


def check_privacy(
    folder: Path,
    words: set[str],
    own_text: str,
    text_of: Mapping[str, Callable[[bytes], bytes]],
    intended_text: Mapping[str, str] | None = None,
) -> GateResult:
    """Check that no file contains absolute paths, user or host names; `measured` is the number of findings.

    Args:
        folder: the package.
        words: strings of `identifying_strings`.
        own_text: vocabulary of medim; its words are not reported.
        text_of: by file suffix, function that removes the parts of a file that cannot contain text.
        intended_text: by file, text that the user wrote for it, such as the names of the authors.
    """
    findings: dict[str, list[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        extract_text, allowed_text = text_of.get(path.suffix), f"{own_text} {(intended_text or {}).get(name, '')}"
        for part, text in [(name, extract_text(data))] if extract_text else text_parts(name, data):
            hits = find_identifying_strings(text, words, own_text=allowed_text)
            if hits:
                findings[part] = hits
    return gate_result(sum(map(len, findings.values())), 0, found=findings)


def _compare_outputs(
    ort: PredictFn, reference: PredictFn, inputs: Sequence[Array], *, allowed: float, max_flip_fraction: float
) -> GateResult:
    """Compare outputs: largest relative difference, and number of voxels (or images) of another class except ties."""
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
    """Check the DICOM output of a segmenter: all classes, on the oblique grid of the phantom, written and read back.

    Args:
        golden: golden input with the phantom.
        contract: contract with label codes.

    Returns:
        Two gates: number of voxels that differ when read back, and errors reported by dciodvfy (`not run` if it is not
        installed).
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
    """Count the errors that dciodvfy (David Clunie's dicom3tools) reports for DICOM files."""
    if shutil.which("dciodvfy") is None:
        return skip_gate("dciodvfy is not installed")
    lines: list[str] = []
    for path in paths:
        process = subprocess.run(["dciodvfy", path.name], cwd=path.parent, capture_output=True, check=False, timeout=60)
        lines += (process.stdout + process.stderr).decode("utf-8", "replace").splitlines()
    if not lines:  # dciodvfy always prints the detected object type
        return skip_gate("dciodvfy produced no output")
    errors = [line for line in lines if line.startswith("Error")]
    return gate_result(len(errors), 0, errors=errors[:5])
