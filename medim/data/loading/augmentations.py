"""Random augmentations from MONAI by name, and the deterministic steps as MONAI transforms.

Augmentations are specified like steps: `[{"op": "flip", "axis": 0}, {"op": "noise", "std": 0.1, "probability": 0.2}]`.
All randomness comes from the given seed, so a view can be reproduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from monai.data.meta_obj import get_track_meta, set_track_meta
from monai.data.meta_tensor import MetaTensor
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import (
    RandAdjustContrast,
    RandBiasField,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandScaleIntensityFixedMean,
    RandShiftIntensity,
)
from monai.transforms.spatial.array import RandFlip
from monai.transforms.transform import RandomizableTransform, Transform
from scipy.spatial.transform import Rotation
from torch.nn.functional import affine_grid, grid_sample

from medim.config import build_from_section, validate_section
from medim.data.preprocessing.steps import STEPS, check_steps
from medim.types import Array, Step, UsageError, Volume


def build_flip(*, spatial_dims: int, axis: int | None = None, probability: float = 0.5) -> RandomizableTransform:
    """Reverse one axis.

    Args:
        spatial_dims: 2 or 3.
        axis: axis to reverse; None is left-right: the first axis in 3D (RAS), the columns in 2D.
        probability: probability of applying the transform.
    """
    axis = (0 if spatial_dims == 3 else 1) if axis is None else axis
    if not 0 <= axis < spatial_dims:
        raise UsageError(f"flip.axis: expected 0 to {spatial_dims - 1} in {spatial_dims}D, got {axis}.")
    return RandFlip(prob=probability, spatial_axis=axis)


def build_affine(
    *,
    spatial_dims: int,
    rotate: float = 10.0,
    scale: float = 0.1,
    translate: float = 0.0,
    padding: Literal["border", "reflection"] = "border",
    probability: float = 0.5,
) -> RandomizableTransform:
    """Rotate, scale and translate about the centre of the view.

    Args:
        spatial_dims: 2 or 3.
        rotate: largest angle about each axis, in degrees.
        scale: largest relative change of size along each axis.
        translate: largest shift along each axis, in voxels.
        padding: values outside of the view: its edge values, or its mirror image.
        probability: probability of applying the transform.
    """
    return _RandomAffine(
        [math.radians(rotate)] * (3 if spatial_dims == 3 else 1),
        [scale] * spatial_dims,
        [translate] * spatial_dims,
        padding=padding,
        probability=probability,
    )


def build_intensity_scale(
    *, factor: float = 0.1, about_mean: bool = False, probability: float = 0.5
) -> RandomizableTransform:
    """Multiply by a random number near 1.

    Args:
        factor: largest difference of that number from 1.
        about_mean: multiply the difference from the mean of the view, which changes its contrast only.
        probability: probability of applying the transform.
    """
    if about_mean:
        return RandScaleIntensityFixedMean(factors=factor, prob=probability)
    return RandScaleIntensity(factors=factor, prob=probability)


def build_intensity_shift(*, offset: float = 0.1, probability: float = 0.5) -> RandomizableTransform:
    """Add a random number.

    Args:
        offset: largest magnitude of that number, in units of the normalised image.
        probability: probability of applying the transform.
    """
    return RandShiftIntensity(offsets=offset, prob=probability)


def build_contrast(*, gamma: tuple[float, float] = (0.7, 1.5), probability: float = 0.3) -> RandomizableTransform:
    """Apply a random gamma, between the minimum and maximum of the view.

    Args:
        gamma: lowest and highest exponent.
        probability: probability of applying the transform.
    """
    return RandAdjustContrast(prob=probability, gamma=gamma)


def build_noise(*, std: float = 0.1, probability: float = 0.3) -> RandomizableTransform:
    """Add Gaussian noise of random strength.

    Args:
        std: largest standard deviation, in units of the normalised image; the actual one is drawn from 0 to `std`.
        probability: probability of applying the transform.
    """
    return RandGaussianNoise(prob=probability, mean=0.0, std=std)


def build_blur(*, sigma: tuple[float, float] = (0.25, 1.0), probability: float = 0.2) -> RandomizableTransform:
    """Smooth with a Gaussian of random width along each axis.

    Args:
        sigma: lowest and highest width (standard deviation), in voxels.
        probability: probability of applying the transform.
    """
    return RandGaussianSmooth(sigma_x=sigma, sigma_y=sigma, sigma_z=sigma, prob=probability)


def build_bias_field(*, strength: float = 0.3, degree: int = 3, probability: float = 0.3) -> RandomizableTransform:
    """Multiply by a smooth bias field, as of an MRI coil. It acts on values above the minimum, as air is not zero.

    Args:
        strength: largest coefficient of a polynomial; the field is its exponential.
        degree: degree of the polynomial.
        probability: probability of applying the transform.
    """
    field = RandBiasField(degree=degree, coeff_range=(-strength, strength), prob=1.0)
    return _AboveMinimum(field, probability=probability)


AUGMENTATIONS: dict[str, Callable[..., RandomizableTransform]] = {
    "flip": build_flip,
    "affine": build_affine,
    "intensity_scale": build_intensity_scale,
    "intensity_shift": build_intensity_shift,
    "contrast": build_contrast,
    "noise": build_noise,
    "blur": build_blur,
    "bias_field": build_bias_field,
}
GEOMETRIC = ("flip", "affine")  # also applied to masks; all others change only intensities


class Augmentation:
    """Sequence of random transforms, drawn anew for each seed.

    Args:
        steps: `{"op": name, **options}` each, names from `AUGMENTATIONS`.
        spatial_dims: 2 or 3.

    Raises:
        UsageError: an unknown name or option (with the nearest spelling), or a value of the wrong type.
    """

    def __init__(self, steps: Sequence[Step], *, spatial_dims: int) -> None:
        self._state = np.random.RandomState(0)  # shared by all transforms, seeded per call; MONAI requires this class
        self._transforms: list[tuple[Any, bool]] = []
        for step in steps:
            _check_probability(step)
            transform = build_from_section(AUGMENTATIONS, step, key="op", spatial_dims=spatial_dims)
            transform.set_random_state(state=self._state)
            self._transforms.append((transform, step["op"] in GEOMETRIC))

    def __call__(self, image: torch.Tensor, seed: int, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
        """Transform an image, and its mask in the same way.

        Args:
            image: (C, ...), float32.
            seed: 0 to 2^32 - 1; the same seed gives the same result.
            mask: (1, ...), or None.

        Returns:
            Image and mask (or None), of the same shapes.
        """
        if not self._transforms:
            return image, mask
        self._state.seed(seed)
        with _disable_meta_tracking():
            for transform, geometric in self._transforms:
                image = transform(image)
                if mask is not None and geometric:
                    options = {"mode": "nearest"} if isinstance(transform, _RandomAffine) else {}
                    mask = transform(mask, randomize=False, **options)
        return image, mask


def as_monai(steps: Sequence[Step]) -> Compose:
    """Convert the deterministic steps to a MONAI pipeline over channel-first `MetaTensor`s, with updated affine.

    Raises:
        UsageError: see `medim.data.preprocessing.steps.check_steps`.
    """
    check_steps(steps)
    return Compose([_StepTransform(step) for step in steps])


class _StepTransform(Transform):
    """One deterministic step on a tensor; without an affine, voxels of 1 mm are assumed."""

    def __init__(self, step: Step) -> None:
        self._function, self._options = validate_section(STEPS, step, key="op", run_args=("volume",))

    def __call__(self, data: torch.Tensor) -> MetaTensor:
        array = data.detach().cpu().numpy().astype(np.float32, copy=False)
        source_affine = data.affine.numpy() if isinstance(data, MetaTensor) else np.eye(4)
        grid_affine = _pad_affine(source_affine)
        out = self._function(Volume(array, grid_affine, grid_affine, array.shape[1:]), **self._options)
        source_meta = data.meta if isinstance(data, MetaTensor) else {}
        meta = {name: value for name, value in source_meta.items() if name != "affine"}
        new_affine = torch.as_tensor(_match_affine_shape(out.affine, source_affine))
        return MetaTensor(torch.from_numpy(np.ascontiguousarray(out.array)), affine=new_affine, meta=meta)


class _RandomAffine(RandomizableTransform):
    """Reimplementation of MONAI's `RandAffine` with two calls of torch: the same draws give the same map.

    On small views the overhead of MONAI's version exceeds the time of a training step (`benchmarks/affine.py`).

    Args:
        rotate: largest angles in radians: one in 2D, three in 3D.
        scale: largest relative change of size along each axis.
        translate: largest shift along each axis, in voxels.
        padding: `border` or `reflection`.
        probability: probability of applying the transform.
    """

    def __init__(
        self,
        rotate: Sequence[float],
        scale: Sequence[float],
        translate: Sequence[float],
        *,
        padding: str = "border",
        probability: float,
    ) -> None:
        super().__init__(probability)
        self._padding = padding
        self._ranges = [np.asarray(r) for r in (rotate, scale, translate)]

    def randomize(self, data: Any = None) -> None:
        """Draw whether to apply the transform, then the angles, scale changes and shifts."""
        super().randomize(data)
        if self._do_transform:
            self._angles, self._zoom, self._shift = (self.R.uniform(-r, r) for r in self._ranges)

    def __call__(self, data: torch.Tensor, randomize: bool = True, mode: str = "bilinear") -> torch.Tensor:
        if randomize:
            self.randomize()
        if not self._do_transform:
            return data
        dims, size = len(self._zoom), np.array(data.shape[:0:-1])
        angles = [0.0] * (3 - len(self._angles)) + list(self._angles)
        rotation = Rotation.from_euler("XYZ", angles).as_matrix()[:dims, :dims]
        # Map from output to input positions in voxels; torch uses coordinates from -1 to 1, last axis first.
        matrix, shift = rotation * (1 + self._zoom), rotation @ self._shift
        theta = np.column_stack([matrix[::-1, ::-1] * size / size[:, None], 2 * shift[::-1] / size])
        grid = affine_grid(torch.from_numpy(theta[None]).float(), [1, *data.shape], align_corners=False)
        output = grid_sample(data[None].float(), grid, mode=mode, padding_mode=self._padding, align_corners=False)
        return output[0].to(data.dtype)


class _AboveMinimum(RandomizableTransform):
    """Wrapper that applies another transform (of probability 1) to the intensities above the image minimum."""

    def __init__(self, transform: RandomizableTransform, *, probability: float) -> None:
        super().__init__(probability)
        self._transform = transform

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandomizableTransform:
        """Seed the inner transform too, so that the seed determines all draws."""
        self._transform.set_random_state(seed, state)
        super().set_random_state(seed, state)
        return self

    def __call__(self, data: torch.Tensor) -> torch.Tensor:
        self.randomize(None)
        if not self._do_transform:
            return data
        minimum = data.amin()
        output: torch.Tensor = self._transform(data - minimum)
        return output + minimum


def _check_probability(step: Step) -> None:
    probability = step.get("probability", 0.5)
    if isinstance(probability, int | float) and not 0 <= probability <= 1:
        raise UsageError(f"{step.get('op')}.probability: expected 0 to 1, got {probability}.")


def _pad_affine(affine: Array) -> Array:
    """Expand an affine to (4, 4); MONAI stores a 2D affine as (3, 3) or (4, 4)."""
    if affine.shape == (4, 4):
        return affine.astype(np.float64)
    out = np.eye(4)
    out[np.ix_([0, 1, 3], [0, 1, 3])] = affine
    return out


def _match_affine_shape(affine: Array, reference: Array) -> Array:
    return affine if reference.shape == (4, 4) else affine[np.ix_([0, 1, 3], [0, 1, 3])]


@contextmanager
def _disable_meta_tracking() -> Iterator[None]:
    """Disable MONAI's metadata tracking, which is slower than the transforms themselves on small views."""
    was_tracking = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(was_tracking)
