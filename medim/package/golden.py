"""Golden input: synthetic image with the network output at export, to test a package on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from medim.data.preprocessing.steps import preprocess, reorient_to_ras, to_native
from medim.inference.network import run_inference
from medim.package.contract import Contract
from medim.tasks import map_tasks_by_kind
from medim.types import Array, PredictFn, Step, Volume

MAX_LOGITS = 4096  # approximate number of stored logits
LOGITS_TOLERANCE, MAX_VOXEL_FRACTION = (
    1e-4,
    1e-4,
)  # largest relative difference of logits, largest fraction of voxels with another label
MAX_SIDE = 160  # largest axis length of a phantom in voxels


@dataclass(frozen=True)
class GoldenDifference:
    """Difference between an output and the output at export.

    Attributes:
        logits: largest absolute difference of the logits, divided by the largest absolute logit or by 1 if that is
            smaller than 1.
        voxels: number of voxels with another label on the native grid.
        voxel_count: number of voxels of the label map; 0 if the network has none.
    """

    logits: float
    voxels: int = 0
    voxel_count: int = 0

    @property
    def is_small(self) -> bool:
        """Whether rounding on another processor can explain the difference."""
        return self.logits <= LOGITS_TOLERANCE and self.voxels <= MAX_VOXEL_FRACTION * self.voxel_count

    def __str__(self) -> str:
        """Summary for a report."""
        voxels = f", {self.voxels} of {self.voxel_count} voxels with another label" if self.voxel_count else ""
        return f"output differs by {self.logits:.1e} (allowed {LOGITS_TOLERANCE:.0e}){voxels}"


@dataclass(frozen=True, eq=False)
class GoldenInput:
    """Phantom and the output of the network for it.

    Attributes:
        volume: phantom as returned by a reader; its native grid is oblique and not in RAS+ order.
        logits: (n,) logits on the preprocessed grid, subsampled evenly.
        labels: (*native_shape) uint8 label map of a segmenter on the native grid; otherwise empty.
    """

    volume: Volume
    logits: Array
    labels: Array

    @classmethod
    def from_run(cls, volume: Volume, run: PredictFn, contract: Contract) -> GoldenInput:
        """Run a network on a phantom, from preprocessing to the native grid."""
        input_volume = preprocess(volume, contract.preprocess)
        logits = run_inference(run, input_volume, contract.inference)
        labels = np.zeros(0, np.uint8)
        task = map_tasks_by_kind().get(contract.kind)
        if task and task.dense:
            labels = to_native(task.to_answer(logits, input_volume, volume)[None], volume)[0]
        return cls(volume, logits.reshape(-1)[:: max(1, logits.size // MAX_LOGITS)].astype(np.float32), labels)

    def compare_run(self, run: PredictFn, contract: Contract) -> GoldenDifference:
        """Run a network on the phantom and compare with the stored output."""
        rerun = GoldenInput.from_run(self.volume, run, contract)
        if rerun.logits.shape != self.logits.shape or rerun.labels.shape != self.labels.shape:
            return GoldenDifference(float("inf"), self.labels.size, self.labels.size)
        gap = np.abs(rerun.logits - self.logits).max(initial=0.0)
        size = max(1.0, float(np.abs(self.logits).max(initial=0.0)))
        logits_difference = float(gap) / size if np.isfinite(gap) else float("inf")
        return GoldenDifference(logits_difference, int((rerun.labels != self.labels).sum()), self.labels.size)

    def dump(self) -> bytes:
        """Serialise to safetensors; the bytes are deterministic."""
        arrays = {
            "image": self.volume.array.astype(np.int16),
            "affine": self.volume.affine,
            "native_affine": self.volume.native_affine,
            "native_shape": np.asarray(self.volume.native_shape, np.int64),
            "logits": self.logits,
            "labels": self.labels,
        }
        return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})

    @classmethod
    def parse(cls, data: bytes) -> GoldenInput:
        """Read the bytes that `dump` returns, without unpickling.

        Raises:
            SafetensorError: the data are not safetensors.
            KeyError: an array is missing, or its type does not exist in NumPy.
        """
        file = safetensors.numpy.load(data)
        shape = tuple(int(n) for n in file["native_shape"])
        volume = Volume(file["image"].astype(np.float32), file["affine"], file["native_affine"], shape)
        return cls(volume, file["logits"], file["labels"])


def make_phantom(
    shape: Sequence[int], steps: Sequence[Step], channels: int, *, exact: bool = False, seed: int = 0
) -> Volume:
    """Make a smooth head-like phantom from ellipsoids on a zero background, without patient data.

    Args:
        shape: approximate shape after preprocessing, in voxels.
        steps: preprocessing steps; the last `resample` step specifies the spacing.
        channels: number of image channels.
        exact: use this shape and spacing for the phantom itself, for networks that accept one size and do not resize
            their input.
        seed: random seed of the ellipsoids.

    Returns:
        Volume of float32 integers from 0 to 1000 in the orientation of the readers. In 3D the native grid is oblique,
        with permuted axes.
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
    affine[:3, :3] = affine[:3, [1, 2, 0]]  # the first axis of the file is anterior-posterior
    affine[:3, 3] = [40.0, 25.0, -30.0]
    array = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    return reorient_to_ras(Volume(array, affine, affine, array.shape[1:]))


def _build_rotation(about_x: float, about_z: float) -> Array:
    c, s = np.cos(about_x), np.sin(about_x)
    d, t = np.cos(about_z), np.sin(about_z)
    x, z = np.array([[1, 0, 0], [0, c, -s], [0, s, c]]), np.array([[d, -t, 0], [t, d, 0], [0, 0, 1]])
    return np.asarray(x @ z)
