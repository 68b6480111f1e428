"""A made-up image with the answer it had at export: whoever holds the package can run it and compare."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medim.data.preprocessing.steps import preprocess, reorient_to_ras, to_native
from medim.inference.arrays import read_npz_arrays
from medim.inference.network import PredictFn, run_inference, to_label_map
from medim.package.contract import Contract
from medim.types import Array, Step, Volume

MAX_LOGITS = 4096  # logits kept
LOGITS_TOLERANCE, MAX_VOXEL_FRACTION = (
    1e-4,
    1e-4,
)  # largest difference of logits (over their size), largest part of voxels with another label
MAX_SIDE = 160  # largest side of a phantom


@dataclass(frozen=True)
class GoldenDifference:
    """How far an answer is from the one at export.

    Attributes:
        logits: largest difference of the network's output over its size (over 1 where it is smaller).
        voxels: voxels of the image's own grid that have another label.
        voxel_count: voxels of the image.
    """

    logits: float
    voxels: int = 0
    voxel_count: int = 0

    @property
    def is_small(self) -> bool:
        """Whether another processor's rounding explains it."""
        return self.logits <= LOGITS_TOLERANCE and self.voxels <= MAX_VOXEL_FRACTION * self.voxel_count

    def __str__(self) -> str:
        """A short sentence for a report."""
        voxels = f", {self.voxels} of {self.voxel_count} voxels with another label" if self.voxel_count else ""
        return f"output differs by {self.logits:.1e} (allowed {LOGITS_TOLERANCE:.0e}){voxels}"


@dataclass(frozen=True, eq=False)
class GoldenInput:
    """A phantom and the answer to it.

    Attributes:
        volume: the phantom as a reader would give it, on a grid that is oblique and runs against RAS+ in the file.
        logits: (n,) some of the network's outputs on the preprocessed grid, evenly spread.
        labels: (*native_shape) uint8 on the file's own grid, of a segmenter; else empty.
    """

    volume: Volume
    logits: Array
    labels: Array

    @classmethod
    def from_run(cls, volume: Volume, run: PredictFn, contract: Contract) -> GoldenInput:
        """Answer for a phantom, from preprocessing to the file's own grid."""
        input_volume = preprocess(volume, contract.preprocess)
        logits = run_inference(run, input_volume, contract.inference)
        labels = np.zeros(0, np.uint8)
        if contract.kind == "segmenter":
            labels = to_native(to_label_map(logits, input_volume, volume)[None], volume)[0]
        return cls(volume, logits.reshape(-1)[:: max(1, logits.size // MAX_LOGITS)].astype(np.float32), labels)

    def compare_run(self, run: PredictFn, contract: Contract) -> GoldenDifference:
        """Compare with what `run` answers now."""
        rerun = GoldenInput.from_run(self.volume, run, contract)
        if rerun.logits.shape != self.logits.shape or rerun.labels.shape != self.labels.shape:
            return GoldenDifference(float("inf"), self.labels.size, self.labels.size)
        gap = np.abs(rerun.logits - self.logits).max(initial=0.0)
        size = max(1.0, float(np.abs(self.logits).max(initial=0.0)))
        logits_difference = float(gap) / size if np.isfinite(gap) else float("inf")
        return GoldenDifference(logits_difference, int((rerun.labels != self.labels).sum()), self.labels.size)

    def dump(self) -> bytes:
        """As a compressed `.npz`, the same bytes for the same content."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            schema_version=np.int64(1),
            image=self.volume.array.astype(np.int16),
            affine=self.volume.affine,
            native_affine=self.volume.native_affine,
            native_shape=np.asarray(self.volume.native_shape, np.int64),
            logits=self.logits,
            labels=self.labels,
        )
        return buffer.getvalue()

    @classmethod
    def parse(cls, data: bytes) -> GoldenInput:
        """Read what `dump` wrote; nothing is unpickled."""
        file = read_npz_arrays(data)
        shape = tuple(int(n) for n in file["native_shape"])
        volume = Volume(file["image"].astype(np.float32), file["affine"], file["native_affine"], shape)
        return cls(volume, file["logits"], file["labels"])


def make_phantom(
    shape: Sequence[int], steps: Sequence[Step], channels: int, *, exact: bool = False, seed: int = 0
) -> Volume:
    """A smooth head-like thing out of ellipsoids on zero background; no patient was involved.

    Args:
        shape: about the size wanted after preprocessing, in voxels.
        steps: the preprocessing; a `resample` tells the spacing.
        channels: of the image.
        exact: have that shape and spacing from the start, for networks that take one size and do not resize to it.
        seed: of the ellipsoids.

    Returns:
        Whole numbers from 0 to 1000, float32, in a reader's orientation; in 3D its file's grid is oblique and turned.
    """
    dims = len(shape)
    rng = np.random.default_rng(seed)
    target_spacing = next((s["spacing"] for s in reversed(steps) if s["op"] == "resample"), [1.0] * dims)
    spacing = np.asarray(target_spacing, float) * (1.0 if exact else np.array([0.9, 1.0, 1.2][3 - dims :]))
    size = [int(np.rint(n * w / s)) for n, w, s in zip(shape, target_spacing, spacing, strict=True)]
    size = size if exact else [int(np.clip(n, 8, MAX_SIDE)) for n in size]
    coordinates = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in size), indexing="ij"))
    head = (coordinates**2).sum(0) < 0.8
    image = 300.0 * head
    for _ in range(12):
        centre = rng.uniform(-0.5, 0.5, dims).reshape(-1, *[1] * dims)
        radius = rng.uniform(0.15, 0.45, dims).reshape(-1, *[1] * dims)
        ellipsoid = 1 - (((coordinates - centre) / radius) ** 2).sum(0)
        image += head * rng.uniform(-120, 250) * np.clip(3 * ellipsoid, 0, 1)
    array = np.stack([np.clip(image * (1 - 0.2 * c), 0, 1000).round() for c in range(channels)]).astype(np.float32)
    affine = np.diag([*spacing, *[1.0] * (4 - dims)])
    if dims == 2:
        return Volume(array, affine, affine, tuple(size))
    affine[:3, :3] = _build_rotation(0.3, 0.2) @ np.diag(spacing * [-1, -1, 1])
    affine[:3, :3] = affine[:3, [1, 2, 0]]  # the file's first axis is the patient's front to back
    affine[:3, 3] = [40.0, 25.0, -30.0]
    array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    return reorient_to_ras(Volume(array, affine, affine, array.shape[1:]))


def _build_rotation(about_x: float, about_z: float) -> Array:
    c, s = np.cos(about_x), np.sin(about_x)
    d, t = np.cos(about_z), np.sin(about_z)
    x, z = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.array([[d, -t, 0], [t, d, 0], [0, 0, 1]])
    return np.asarray(x @ z)
