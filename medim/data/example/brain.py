"""Simulated brain MRI: the MNI152 template, deformed to individual anatomies and scanned with simulated contrast.

All functions work on regular axis-aligned grids in millimetres of MNI space, RAS+. A deformation is a displacement
field (3, ...) in mm on a coarse control grid: the scan at point x shows the template at x + displacement(x).
Displacements are exponentials of smooth stationary velocity fields, so that they do not fold (Arsigny et al., MICCAI
2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from medim.types import Array, UserError
from medim.version import install_command

FIELD_CENTRE = (0.0, -17.0, 5.0)  # mm, the centre of the template's brain
FIELD_OF_VIEW = (176.0, 208.0, 176.0)  # mm: the brain with a margin of 11 to 16 mm


@dataclass(frozen=True)
class VoxelGrid:
    """Regular grid with voxel centres at `origin + spacing * index`, in mm, RAS+."""

    origin: tuple[float, float, float]
    spacing: float
    shape: tuple[int, int, int]

    @classmethod
    def around_brain(cls, margin: float, spacing: float) -> VoxelGrid:
        """Build the grid centred on the brain that covers the field of view plus `margin` mm on every side.

        Each side has a multiple of 4 voxels.
        """
        x, y, z = (4 * int(np.ceil((extent + 2 * margin) / spacing / 4)) for extent in FIELD_OF_VIEW)
        i, j, k = (c - spacing * (n - 1) / 2 for c, n in zip(FIELD_CENTRE, (x, y, z), strict=True))
        return cls((i, j, k), spacing, (x, y, z))

    @property
    def affine(self) -> Array:
        """(4, 4) float64, voxel index to mm."""
        affine = np.diag([self.spacing, self.spacing, self.spacing, 1.0])
        affine[:3, 3] = self.origin
        return affine

    def voxel_centres(self) -> Array:
        """Compute the voxel centres, (3, ...) float32, in mm."""
        axes = [o + self.spacing * np.arange(n) for o, n in zip(self.origin, self.shape, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)

    def sample(self, values: Array, points: Array) -> Array:
        """Interpolate `values` (C, ...) linearly at `points` (3, ...) in mm: (C, ...) float32, edge values outside."""
        origin = np.array(self.origin, dtype=np.float32).reshape(3, *[1] * (points.ndim - 1))
        index = (points - origin) / np.float32(self.spacing)
        out = [ndimage.map_coordinates(v, index, order=1, mode="nearest", output=np.float32) for v in values]
        return np.stack(out)

    def refine(self, values: Array, finer: VoxelGrid) -> Array:
        """Resample `values` (C, ...) to a `finer` grid inside this one; separable, so faster than `sample`."""
        for axis in range(3):
            positions = (
                finer.origin[axis] + finer.spacing * np.arange(finer.shape[axis]) - self.origin[axis]
            ) / self.spacing
            low = np.clip(np.floor(positions).astype(int), 0, self.shape[axis] - 2)
            weight = (positions - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
            values = values.take(low, axis + 1) * (1 - weight) + values.take(low + 1, axis + 1) * weight
        return values


CONTROL_GRID = VoxelGrid.around_brain(margin=12.0, spacing=4.0)


@dataclass(frozen=True, eq=False)
class BrainTemplate:
    """Template brain; every subject is a deformation of it.

    Attributes:
        grid: the template's 1 mm grid, cropped to the brain.
        maps: (4, ...) float32: fractions of grey matter, white matter and CSF in each voxel (0 to 1), and the residual
            of the T1 image that the tissues do not explain, in units of white matter.
        support: bool, the voxels within 2 mm of any tissue.
        expansion: (3, ...) float32 on `CONTROL_GRID`, a velocity in mm that widens the lateral ventricles and preserves
            volume elsewhere. Flowing along it for a time of 1, 2, 3 changes their volume from 18 ml to 25, 33, 42 ml.
    """

    grid: VoxelGrid
    maps: Array
    support: Array
    expansion: Array


def load_template(spacing: float) -> BrainTemplate:
    """Load the T1 image and tissue maps included in nilearn (no download), blurred for scans of `spacing` mm.

    Raises:
        UserError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise UserError(
            "The built-in cohort is simulated from the MNI152 template in nilearn, and nilearn is not "
            f"installed. Run: {install_command('train')}"
        ) from error
    loaders = (datasets.load_mni152_template, datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    images = [loader(resolution=1) for loader in loaders]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    box = tuple(slice(max(s.start - 4, 0), s.stop + 4) for s in ndimage.find_objects((t1 > 0).astype(np.uint8))[0])
    t1, grey, white = t1[box], grey[box], white[box]
    x, y, z = (float(o + s.start) for o, s in zip(images[0].affine[:3, 3], box, strict=True))
    grid = VoxelGrid((x, y, z), 1.0, t1.shape)

    tissues = np.stack([grey, white, np.clip((t1 > 0) - grey - white, 0, 1)])
    means = np.array([t1[share > 0.9].mean() for share in tissues], dtype=np.float32)
    detail = (t1 - np.tensordot(means, tissues, axes=1)) / means[1]
    expansion = _compute_expansion(_segment_ventricles(tissues[2], grid), grid)
    blur = 0.4 * np.sqrt(max(spacing**2 - 1.0, 0.0))  # mm; leaves half the amplitude at the new Nyquist frequency
    maps = np.stack([ndimage.gaussian_filter(m, blur) if blur else m for m in (*tissues, detail)])
    support = ndimage.binary_dilation(maps[:3].sum(0) > 1e-3, iterations=2)
    return BrainTemplate(grid, maps, support, expansion)


def _segment_ventricles(csf: Array, grid: VoxelGrid) -> Array:
    """Segment the largest connected component of CSF in a central box: bool, 16 to 18 ml."""
    x, y, z = grid.voxel_centres()
    inside = (np.abs(x) < 40) & (y > -62) & (y < 36) & (z > -5) & (z < 32)
    pieces, _ = ndimage.label((csf > 0.5) & inside)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray(pieces == sizes.argmax())


def _compute_expansion(region: Array, grid: VoxelGrid) -> Array:
    """Compute the curl-free velocity in mm (a gradient) with divergence log 2 in `region` and 0 elsewhere."""
    soft = ndimage.gaussian_filter(region.astype(np.float32), CONTROL_GRID.spacing / 2)  # (X, Y, Z) at 1 mm
    # (x, y, z) at the 4 mm of the control grid
    rate = float(np.log(2)) * grid.sample(soft[None], CONTROL_GRID.voxel_centres())[0]
    waves = [2 * np.pi * fft.fftfreq(n, CONTROL_GRID.spacing) for n in CONTROL_GRID.shape]
    k = np.stack(np.meshgrid(*waves, indexing="ij"))  # (3, x, y, z) rad/mm
    square = (k**2).sum(0)
    square[0, 0, 0] = np.inf  # the mean rate has no potential on a periodic grid; it is near 0 and ignored
    potential = -fft.fftn(rate) / square
    return np.stack([fft.ifftn(1j * wave * potential).real for wave in k]).astype(np.float32)


def compose_displacements(outer: Array, inner: Array) -> Array:
    """Compose two displacements on `CONTROL_GRID`, `inner` first: inner(x) + outer(x + inner(x))."""
    return np.asarray(inner + CONTROL_GRID.sample(outer, CONTROL_GRID.voxel_centres() + inner))


def integrate_velocity(velocity: Array) -> Array:
    """Integrate a smooth stationary velocity (3, ...) on `CONTROL_GRID`, in mm, to a displacement after unit time.

    Method: scaling and squaring, exp(v) = exp(v / 2) o exp(v / 2), with exp(v) = x + v for a v of at most 0.5 mm.
    """
    squarings = max(0, int(np.ceil(np.log2(max(float(np.abs(velocity).max()), 0.5) / 0.5))))
    displacement = velocity / np.float32(2**squarings)
    for _ in range(squarings):
        displacement = compose_displacements(displacement, displacement)
    return displacement


def draw_smooth_noise(rng: np.random.Generator, *, channels: int, scale: float, sd: float) -> Array:
    """Draw a Gaussian random field (channels, ...) on `CONTROL_GRID`: correlation length `scale` mm, deviation `sd`."""
    white = rng.standard_normal((channels, *CONTROL_GRID.shape), dtype=np.float32)
    field = np.stack([ndimage.gaussian_filter(c, scale / CONTROL_GRID.spacing, mode="wrap") for c in white])
    return np.asarray(field * (np.float32(sd) / field.std()))


def draw_anatomy(template: BrainTemplate, rng: np.random.Generator, *, enlarged: bool) -> Array:
    """Draw the displacement (3, ...) of a subject on `CONTROL_GRID`: random deformation and ventricle size.

    The two classes differ only in the distribution of the ventricle growth: before the random deformation, `enlarged`
    ventricles have 31 to 44 ml, the others 15 to 21 ml.
    """
    growth = rng.uniform(1.8, 3.2) if enlarged else rng.uniform(-0.5, 0.5)
    broad = draw_smooth_noise(rng, channels=3, scale=20.0, sd=2.5)
    fine = draw_smooth_noise(rng, channels=3, scale=9.0, sd=0.8)
    # inverse flow: for wider ventricles, points are mapped to template positions further inside
    inward = integrate_velocity(template.expansion * -growth)
    return compose_displacements(inward, integrate_velocity(broad + fine))


def draw_pose(rng: np.random.Generator) -> Array:
    """Draw the displacement (3, ...) of the head position: about 1 degree of rotation and 1 mm of shift."""
    a, b, c = rng.normal(0.0, np.deg2rad(1.0), 3)
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    rotation = np.eye(3) + cross + cross @ cross / 2  # the exponential to second order
    offsets = CONTROL_GRID.voxel_centres() - np.reshape(FIELD_CENTRE, (3, 1, 1, 1)).astype(np.float32)
    rotation_shift = sum((rotation - np.eye(3))[:, i].reshape(3, 1, 1, 1) * offsets[i] for i in range(3))
    return np.asarray(rotation_shift + rng.normal(0.0, 1.0, (3, 1, 1, 1)), dtype=np.float32)


def deform_template(template: BrainTemplate, displacement: Array, grid: VoxelGrid) -> Array:
    """Deform the template's `maps` (4, ...) by `displacement` (3, ...) on `CONTROL_GRID`, resampled to `grid`."""
    points = grid.voxel_centres() + CONTROL_GRID.refine(displacement, grid)
    origin = np.array(template.grid.origin, dtype=np.float32).reshape(3, 1, 1, 1)
    nearest = np.rint(points - origin).astype(np.int32)  # the template's voxels are 1 mm
    max_index = np.reshape(template.grid.shape, (3, 1, 1, 1)).astype(np.int32) - 1
    inside = template.support[tuple(np.clip(nearest, 0, max_index))]  # a third of the grid; the rest stays 0
    maps = np.zeros((len(template.maps), *grid.shape), dtype=np.float32)
    maps[:, inside] = template.grid.sample(template.maps, points[:, inside])
    return maps


def compute_jacobian(displacement: Array, grid: VoxelGrid) -> Array:
    """Compute the Jacobian determinant on `grid` (...): above 1 where the template shrinks, negative in a fold."""
    field = CONTROL_GRID.refine(displacement, grid)
    gradient = np.stack([np.stack(np.gradient(d, grid.spacing)) for d in field])  # (3, 3, ...)
    return np.asarray(np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)))


def label_tissues(maps: Array) -> Array:
    """Label the tissue of each voxel, uint8: 0 background, 1 grey matter, 2 white matter, 3 other (CSF)."""
    tissues = maps[:3]
    return np.where(tissues.sum(0) > 0.5, tissues.argmax(0) + 1, 0).astype(np.uint8)


def draw_scan(maps: Array, grid: VoxelGrid, rng: np.random.Generator) -> Array:
    """Simulate one T1-weighted acquisition of `maps` (4, ...): int16 magnitudes of at least 1, on `grid`.

    Random parameters: the brightness of each tissue, the overall scale, a smooth multiplicative coil bias (about 12 %)
    and the noise: |signal + n1 + i n2| with n1, n2 normal, 1.5 to 4 % of white matter. The magnitude is therefore
    Rician (Gudbjartsson and Patz, MRM 1995).
    """
    grey, csf, detail = rng.uniform(0.62, 0.84), rng.uniform(0.2, 0.42), rng.uniform(0.7, 1.1)  # white matter is 1
    signal = grey * maps[0] + maps[1] + csf * maps[2] + detail * maps[3]
    bias = CONTROL_GRID.refine(draw_smooth_noise(rng, channels=1, scale=40.0, sd=0.12), grid)[0]
    signal = np.maximum(signal, 0) * np.exp(bias)
    noise = rng.uniform(0.015, 0.04) * rng.standard_normal((2, *grid.shape), dtype=np.float32)
    magnitude = np.hypot(signal + noise[0], noise[1])
    white_matter = float(np.exp(rng.uniform(np.log(250), np.log(1500))))  # the scanner's arbitrary units
    return np.asarray(np.clip(np.rint(magnitude * white_matter), 1, np.iinfo(np.int16).max), dtype=np.int16)
