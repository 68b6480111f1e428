"""What must hold before a package exists: each gate measures one thing and says what it allows."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from medim.data.preprocessing.steps import to_native
from medim.export.privacy_scan import readable, scan
from medim.inference.network import Run
from medim.package.contract import Contract
from medim.package.gate import Gate, gate, not_run
from medim.package.golden import LOGITS, VOXELS, Golden
from medim.types import Array, UserError

RANDOM, LITTLE_CONTRAST = 1e-4, 1e-2  # largest difference of outputs, over their size where that is above 1
FLIPS = 1e-4  # largest part of voxels with another class, on inputs with little contrast
TIE = 1e-5  # two classes nearer than this (over the size) are a tie, which rounding decides


def weights(packed: Mapping[str, Array], run: Mapping[str, Array]) -> Gate:
    """The tensors of the package are those of the run, bit by bit."""
    different = [key for key in sorted(packed.keys() | run.keys()) if not _same(packed.get(key), run.get(key))]
    return gate(len(different), 0, tensors=len(run), different=different[:5])


def random_inputs(ort: Run, torch: Run, channels: int, shapes: Sequence[tuple[int, ...]]) -> Gate:
    """N(0, 1) at sizes and batch sizes that the tracer never saw."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((n, channels, *shape)).astype(np.float32) for shape in shapes for n in (1, 3)]
    return _compare(ort, torch, inputs, allowed=RANDOM, flips=0.0)


def little_contrast(ort: Run, exact: Run, channels: int, shape: tuple[int, ...]) -> Gate:
    """Zeros, a constant, one bright corner, a large offset: where a norm divides by next to nothing.

    Args:
        ort: the network under ONNX Runtime.
        exact: under torch in float64, because torch's own float32 is no reference here.
        channels: of the input.
        shape: its grid.
    """
    zeros = np.zeros((1, channels, *shape), np.float32)
    corner = zeros.copy()
    corner[(slice(None), slice(None), *[slice(4)] * len(shape))] = 1
    offset = (5000 + np.random.default_rng(1).standard_normal(zeros.shape)).astype(np.float32)
    return _compare(ort, exact, [zeros, zeros - np.float32(0.7), corner, offset], allowed=LITTLE_CONTRAST, flips=FLIPS)


def refusals(ort: Run, shapes: Sequence[tuple[int, ...]]) -> Gate:
    """Inputs outside the contract raise; `measured` counts those that were answered."""
    answered = []
    for shape in shapes:
        try:
            ort(np.zeros(shape, np.float32))
        except UserError:
            continue
        answered.append(list(shape))
    return gate(len(answered), 0, refused=len(shapes) - len(answered), answered=answered)


def phantom_answer(golden: Golden, ort: Run, contract: Contract) -> Gate:
    """From image to answer on the file's own grid, ONNX Runtime against the torch answer in `golden`."""
    found = golden.difference(ort, contract)
    counts = {"voxels": found.voxels, "of": found.of, "allowed_part": VOXELS}
    return gate(_rounded(found.logits), LOGITS, ok=found.small, **counts)


def privacy(folder: Path, words: set[str], own: str, text_of: Mapping[str, Callable[[bytes], bytes]]) -> Gate:
    """No absolute path, user or host name in any file; `measured` counts the findings.

    Args:
        folder: the package.
        words: see `machine_words`.
        own: medim's own vocabulary, which is nobody's secret.
        text_of: for a file suffix, a function that takes away what cannot hold text.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        reduce = text_of.get(path.suffix)
        for part, text in [(name, reduce(data))] if reduce else readable(name, data):
            hits = scan(text, words, own=own)
            if hits:
                found[part] = hits
    return gate(sum(map(len, found.values())), 0, found=found)


def _compare(ort: Run, reference: Run, inputs: Sequence[Array], *, allowed: float, flips: float) -> Gate:
    """Largest difference over the outputs' size, and how many voxels (or images) change class but for ties."""
    worst, flipped, ties, voxels = 0.0, 0, 0, 0
    for image in inputs:
        have, want = ort(image).astype(np.float64), reference(image).astype(np.float64)
        size = max(1.0, float(np.abs(want).max()))
        gap = float(np.abs(have - want).max()) / size
        worst = max(worst, gap if np.isfinite(gap) else float("inf"))
        ranked = np.sort(want, axis=1)
        tie = ranked[:, -1] - ranked[:, max(-2, -want.shape[1])] < TIE * size
        differs = have.argmax(1) != want.argmax(1)
        flipped += int((differs & ~tie).sum())
        ties += int((differs & tie).sum())
        voxels += tie.size
    counts = {"flips": flipped, "flips_at_ties": ties, "of": voxels, "inputs": [list(image.shape) for image in inputs]}
    return gate(_rounded(worst), allowed, ok=worst <= allowed and flipped <= flips * voxels, **counts)


def _same(a: Array | None, b: Array | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and a.tobytes() == b.tobytes() and a.shape == b.shape


def _rounded(value: float) -> float:
    return float(f"{value:.2e}") if np.isfinite(value) else 1e30


def dicom_answers(golden: Golden, contract: Contract) -> dict[str, Gate]:
    """A segmenter's answer in DICOM: every class, on the phantom's oblique grid, written and read back.

    Args:
        golden: the phantom.
        contract: with label codes.

    Returns:
        two gates: voxels that read back otherwise, and what dciodvfy calls an error (`not run` where it is missing).
    """
    from medim.export.dicom_phantom import phantom_source
    from medim.predict.dicom.equipment import Equipment
    from medim.predict.dicom.segmentation import read_back, segmentation, written
    from medim.predict.dicom.structured_report import volumes_report
    from medim.predict.dicom.writer import save

    image = to_native(golden.volume.array[:1], golden.volume)[0]
    classes = len(contract.labels)
    edges = np.quantile(image[image > image.min()], np.linspace(0.2, 0.9, classes))
    source, equipment = phantom_source(golden.volume), Equipment(contract, "0" * 64)
    frames = source.frames(np.searchsorted(edges, image).astype(np.uint8))
    made = segmentation(frames, source, equipment)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("seg.dcm", "sr.dcm")]
        save(paths[0], made)
        save(paths[1], volumes_report(made, [1.0] * classes, source, equipment))
        wrong = int((read_back(written(paths[0]), source) != frames).sum())
        errors = _dciodvfy(paths)
    return {"DICOM segmentation, read back": gate(wrong, 0, of=frames.size), "DICOM answers, dciodvfy": errors}


def _dciodvfy(paths: Sequence[Path]) -> Gate:
    """Errors by David Clunie's checker, of dicom3tools."""
    if shutil.which("dciodvfy") is None:
        return not_run("dciodvfy is not installed")
    told: list[str] = []
    for path in paths:
        ran = subprocess.run(["dciodvfy", path.name], cwd=path.parent, capture_output=True, check=False, timeout=60)
        told += (ran.stdout + ran.stderr).decode("utf-8", "replace").splitlines()
    if not told:  # it names at least what it took the object for
        return not_run("dciodvfy ended without a word")
    errors = [line for line in told if line.startswith("Error")]
    return gate(len(errors), 0, errors=errors[:5])
