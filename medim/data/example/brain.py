"""A simulated brain: the MNI152 template, deformed as one person's anatomy and seen by one scanner.

Everything here works on regular axis-aligned grids in millimetres of MNI space, RAS+. A deformation is a displacement
(3, ...) in mm on a coarse control grid: the scan at point x shows the template at x + displacement(x). Displacements
come from the exponential of a smooth stationary velocity, so that they fold nowhere (Arsigny et al., MICCAI 2006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import fft, ndimage

from medim.types import Array, UserError
from medim.version import install_command

FIELD_CENTRE = (0.0, -17.0, 5.0)  # mm, the middle of the template's brain
FIELD_OF_VIEW = (176.0, 208.0, 176.0)  # mm: the brain and 11 to 16 mm around it


@dataclass(frozen=True)
class VoxelGrid:
    """Voxel centres at `origin + spacing * index`, in mm, RAS+."""

    origin: tuple[float, float, float]
    spacing: float
    shape: tuple[int, int, int]

    @classmethod
    def around_brain(cls, margin: float, spacing: float) -> VoxelGrid:
        """The grid centred on the brain that covers the field of view and `margin` mm more on every side.

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
        """(3, ...) float32, where every voxel centre lies, in mm."""
        axes = [o + self.spacing * np.arange(n) for o, n in zip(self.origin, self.shape, strict=True)]
        return np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)

    def sample(self, values: Array, points: Array) -> Array:
        """`values` (C, ...) of this grid at `points` (3, ...) in mm: (C, ...) float32, trilinear, the edge outside."""
        origin = np.array(self.origin, dtype=np.float32).reshape(3, *[1] * (points.ndim - 1))
        index = (points - origin) / np.float32(self.spacing)
        out = [ndimage.map_coordinates(v, index, order=1, mode="nearest", output=np.float32) for v in values]
        return np.stack(out)

    def refine(self, values: Array, finer: VoxelGrid) -> Array:
        """`values` (C, ...) of this grid on a `finer` grid inside it: `sample`, but an axis at a time, faster."""
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
    """The mean brain that every subject is a deformation of.

    Attributes:
        grid: the template's own 1 mm grid, cropped to the brain.
        maps: (4, ...) float32: the share of grey matter, white matter and CSF in each voxel (0 to 1), and the detail
            of the T1 image that these three do not explain, in units of white matter.
        support: bool, the voxels within 2 mm of any tissue.
        expansion: (3, ...) float32 on `CONTROL_GRID`, a velocity in mm that widens the lateral ventricles and preserves
            volume elsewhere. Flowing along it for a time of 1, 2, 3 makes their 18 ml 25, 33, 42 ml.
    """

    grid: VoxelGrid
    maps: Array
    support: Array
    expansion: Array


def load_template(spacing: float) -> BrainTemplate:
    """The T1 image and tissue maps that ship inside nilearn (nothing is downloaded), blurred for scans of `spacing` mm.

    Raises:
        UserError: nilearn is not installed.
    """
    try:
        from nilearn import datasets
    except ImportError as error:
        raise UserError(
            "The built-in cohort is simulated from the MNI152 template that nilearn ships, and nilearn is not "
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
    blur = 0.4 * np.sqrt(max(spacing**2 - 1.0, 0.0))  # mm; half the amplitude is left at the new Nyquist frequency
    maps = np.stack([ndimage.gaussian_filter(m, blur) if blur else m for m in (*tissues, detail)])
    support = ndimage.binary_dilation(maps[:3].sum(0) > 1e-3, iterations=2)
    return BrainTemplate(grid, maps, support, expansion)


def _segment_ventricles(csf: Array, grid: VoxelGrid) -> Array:
    """The largest connected piece of CSF in a box around the middle of the brain: bool, 16 to 18 ml."""
    x, y, z = grid.voxel_centres()
    inside = (np.abs(x) < 40) & (y > -62) & (y < 36) & (z > -5) & (z < 32)
    pieces, _ = ndimage.label((csf > 0.5) & inside)
    sizes = np.bincount(pieces.ravel())
    sizes[0] = 0
    return np.asarray(pieces == sizes.argmax())


def _compute_expansion(region: Array, grid: VoxelGrid) -> Array:
    """The curl-free velocity, in mm, whose divergence is log 2 in `region` and 0 elsewhere: a potential's gradient."""
    soft = ndimage.gaussian_filter(region.astype(np.float32), CONTROL_GRID.spacing / 2)  # (X, Y, Z) at 1 mm
    rate = (
        float(np.log(2)) * grid.sample(soft[None], CONTROL_GRID.voxel_centres())[0]
    )  # (x, y, z) at the control grid's 4 mm
    waves = [2 * np.pi * fft.fftfreq(n, CONTROL_GRID.spacing) for n in CONTROL_GRID.shape]
    k = np.stack(np.meshgrid(*waves, indexing="ij"))  # (3, x, y, z) rad/mm
    square = (k**2).sum(0)
    square[0, 0, 0] = np.inf  # the mean rate has no potential on a periodic grid: it is left out, being near 0
    potential = -fft.fftn(rate) / square
    return np.stack([fft.ifftn(1j * wave * potential).real for wave in k]).astype(np.float32)


def compose_displacements(outer: Array, inner: Array) -> Array:
    """The displacement on `CONTROL_GRID` that follows `inner` and then `outer`: x + inner(x) + outer(x + inner(x))."""
    return np.asarray(inner + CONTROL_GRID.sample(outer, CONTROL_GRID.voxel_centres() + inner))


def integrate_velocity(velocity: Array) -> Array:
    """How far a smooth stationary velocity (3, ...) on `CONTROL_GRID`, in mm, has carried each point after unit time.

    By scaling and squaring: exp(v) = exp(v / 2) o exp(v / 2), and exp(v) = x + v for a v of at most 0.5 mm.
    """
    squarings = max(0, int(np.ceil(np.log2(max(float(np.abs(velocity).max()), 0.5) / 0.5))))
    displacement = velocity / np.float32(2**squarings)
    for _ in range(squarings):
        displacement = compose_displacements(displacement, displacement)
    return displacement


def draw_smooth_noise(rng: np.random.Generator, *, channels: int, scale: float, sd: float) -> Array:
    """Gaussian random field (channels, ...) on `CONTROL_GRID`, correlated over `scale` mm, standard deviation `sd`."""
    white = rng.standard_normal((channels, *CONTROL_GRID.shape), dtype=np.float32)
    field = np.stack([ndimage.gaussian_filter(c, scale / CONTROL_GRID.spacing, mode="wrap") for c in white])
    return np.asarray(field * (np.float32(sd) / field.std()))


def draw_anatomy(template: BrainTemplate, rng: np.random.Generator, *, enlarged: bool) -> Array:
    """Displacement (3, ...) of a subject on `CONTROL_GRID`: broad and fine random deformation, and the ventricle size.

    Both classes share every distribution but that of the ventricles' growth: `enlarged` ones have 31 to 44 ml, the
    others 15 to 21 ml, before the random deformation.
    """
    growth = rng.uniform(1.8, 3.2) if enlarged else rng.uniform(-0.5, 0.5)
    broad = draw_smooth_noise(rng, channels=3, scale=20.0, sd=2.5)
    fine = draw_smooth_noise(rng, channels=3, scale=9.0, sd=0.8)
    inward = integrate_velocity(
        template.expansion * -growth
    )  # where it is wider, the template is looked up further inside
    return compose_displacements(inward, integrate_velocity(broad + fine))


def draw_pose(rng: np.random.Generator) -> Array:
    """Displacement (3, ...) of the head position on `CONTROL_GRID`: about 1 degree of rotation and 1 mm of shift."""
    a, b, c = rng.normal(0.0, np.deg2rad(1.0), 3)
    cross = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
    rotation = np.eye(3) + cross + cross @ cross / 2  # the exponential to second order
    offsets = CONTROL_GRID.voxel_centres() - np.reshape(FIELD_CENTRE, (3, 1, 1, 1)).astype(np.float32)
    rotation_shift = sum((rotation - np.eye(3))[:, i].reshape(3, 1, 1, 1) * offsets[i] for i in range(3))
    return np.asarray(rotation_shift + rng.normal(0.0, 1.0, (3, 1, 1, 1)), dtype=np.float32)


def deform_template(template: BrainTemplate, displacement: Array, grid: VoxelGrid) -> Array:
    """The template's `maps` (4, ...) as `displacement` (3, ...) on `CONTROL_GRID` shows them on `grid`."""
    points = grid.voxel_centres() + CONTROL_GRID.refine(displacement, grid)
    origin = np.array(template.grid.origin, dtype=np.float32).reshape(3, 1, 1, 1)
    nearest = np.rint(points - origin).astype(np.int32)  # the template's voxels are 1 mm
    max_index = np.reshape(template.grid.shape, (3, 1, 1, 1)).astype(np.int32) - 1
    inside = template.support[tuple(np.clip(nearest, 0, max_index))]  # a third of the grid: the rest stays 0
    maps = np.zeros((len(template.maps), *grid.shape), dtype=np.float32)
    maps[:, inside] = template.grid.sample(template.maps, points[:, inside])
    return maps


def compute_jacobian(displacement: Array, grid: VoxelGrid) -> Array:
    """The determinant of the deformation on `grid` (...): above 1 where the template shrinks, negative in a fold."""
    field = CONTROL_GRID.refine(displacement, grid)
    gradient = np.stack([np.stack(np.gradient(d, grid.spacing)) for d in field])  # (3, 3, ...)
    return np.asarray(np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1)) + np.eye(3)))


def label_tissues(maps: Array) -> Array:
    """Tissue of each voxel, uint8: 0 background, 1 grey matter, 2 white matter, 3 other (CSF)."""
    tissues = maps[:3]
    return np.where(tissues.sum(0) > 0.5, tissues.argmax(0) + 1, 0).astype(np.uint8)


def draw_scan(maps: Array, grid: VoxelGrid, rng: np.random.Generator) -> Array:
    """What one T1-weighted acquisition shows of `maps` (4, ...): int16 magnitudes from 1 up, on `grid`.

    The scanner sets the brightness of each tissue, the overall scale, a smooth multiplicative coil bias (about 12 %)
    and the noise: |signal + n1 + i n2| with n1, n2 normal, 1.5 to 4 % of white matter, which makes the magnitude Rician
    (Gudbjartsson and Patz, MRM 1995).
    """
    grey, csf, detail = rng.uniform(0.62, 0.84), rng.uniform(0.2, 0.42), rng.uniform(0.7, 1.1)  # white matter is 1
    signal = grey * maps[0] + maps[1] + csf * maps[2] + detail * maps[3]
    bias = CONTROL_GRID.refine(draw_smooth_noise(rng, channels=1, scale=40.0, sd=0.12), grid)[0]
    signal = np.maximum(signal, 0) * np.exp(bias)
    noise = rng.uniform(0.015, 0.04) * rng.standard_normal((2, *grid.shape), dtype=np.float32)
    magnitude = np.hypot(signal + noise[0], noise[1])
    white_matter = float(np.exp(rng.uniform(np.log(250), np.log(1500))))  # the scanner's arbitrary units
    return np.asarray(np.clip(np.rint(magnitude * white_matter), 1, np.iinfo(np.int16).max), dtype=np.int16)
