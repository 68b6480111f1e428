"""Figures against images whose noise, emptiness and range are known, and the hash against planted copies."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from medim.data.index.index import build_index
from medim.data.preprocessing.quality import FLAGS, MAX_LEVELS, compute_perceptual_hash, list_flags, measure_quality
from medim.data.readers import read_volume
from medim.types import Array, Volume
from tests.data.synthetic import dataset, save, write_nifti

RNG = np.random.default_rng(0)


def volume(array: Array, spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Volume:
    affine = np.diag([*spacing, 1.0])
    return Volume(array[None].astype(np.float32), affine, affine, array.shape)


def anatomy(*shape: int, seed: int = 0) -> Array:
    """A smooth bright body, 100 to 200, in zero air."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    texture = gaussian_filter(rng.normal(size=shape), [n / 12 for n in shape])
    return np.where((grid**2).sum(axis=0) < 0.6, 150 + 50 * texture / np.abs(texture).max(), 0.0)


def bits(one: str | None, two: str | None) -> int:
    assert one is not None
    assert two is not None
    return (int(one, 16) ^ int(two, 16)).bit_count()


class TestFigures:
    @pytest.mark.parametrize("shape", [(128, 128), (48, 64, 20)])
    @pytest.mark.parametrize("sigma", [2.0, 8.0])
    def test_planted_noise_is_found(self, shape: tuple[int, ...], sigma: float) -> None:
        clean = anatomy(*shape)
        found = measure_quality(volume(clean + RNG.normal(0, sigma, shape) * (clean > 0)))
        assert found.noise == pytest.approx(sigma, rel=0.08)
        assert found.snr == pytest.approx(150 / sigma, rel=0.12)

    def test_noise_is_measured_within_thick_slices_and_not_across_them(self) -> None:
        steps = np.broadcast_to(RNG.normal(100, 30, 40)[:, None, None], (40, 32, 32))  # slices that differ a lot
        found = measure_quality(volume(steps + RNG.normal(0, 3, steps.shape), (5.0, 1.0, 1.0)))
        assert found.noise == pytest.approx(3, rel=0.05)

    def test_air_is_empty_also_where_it_is_noisy(self) -> None:
        clean = anatomy(64, 64, 32)
        noisy = np.hypot(clean + RNG.normal(0, 4, clean.shape), RNG.normal(0, 4, clean.shape))
        assert measure_quality(volume(clean)).background_fraction == pytest.approx((clean == 0).mean(), abs=1e-6)
        assert measure_quality(volume(noisy)).background_fraction == pytest.approx((clean == 0).mean(), abs=0.02)

    def test_range_levels_and_saturation_are_counted(self) -> None:
        ramp = np.arange(40_000.0).reshape(200, 200) - 7
        found = measure_quality(volume(ramp, (1.0, 1.0, 1.0)))
        assert (found.minimum, found.maximum, found.n_unique_values) == (-7, 39_992, MAX_LEVELS)
        assert (found.p1, found.median, found.p99) == pytest.approx((392.99, 19992.5, 39592.01))
        assert found.saturated == 1 / 40_000
        clipped = measure_quality(volume(np.minimum(ramp // 4000, 5)))
        assert clipped.n_unique_values == 7  # -1 to 5
        assert clipped.saturated == pytest.approx(0.5, abs=0.001)

    def test_a_tiny_or_flat_image_has_no_noise_figure(self) -> None:
        assert measure_quality(volume(RNG.normal(size=(4, 4)))).noise is None
        flat = measure_quality(volume(anatomy(64, 64) > 0))
        assert (flat.noise, flat.snr) == (0.0, None)


class TestFlags:
    @pytest.mark.parametrize(
        ("array", "expected"),
        [
            (anatomy(64, 64, 16) + RNG.normal(0, 5, (64, 64, 16)), ()),
            (anatomy(64, 64, 16) + RNG.normal(0, 60, (64, 64, 16)), ("noisy",)),
            (np.pad(RNG.normal(90, 3, (6, 6, 6)), 20), ("mostly-empty",)),
            (np.minimum(anatomy(64, 64) + RNG.normal(0, 3, (64, 64)), 170), ("clipped",)),
            (np.add.outer(np.arange(64), np.arange(64)) // 9, ("few-levels",)),
        ],
        ids=["clean", "noise", "empty", "saturated", "levels"],
    )
    def test_each_flag_is_raised_by_what_it_says(self, array: Array, expected: tuple[str, ...]) -> None:
        assert list_flags(vars(measure_quality(volume(array)))) == expected

    def test_a_threshold_itself_raises_nothing(self) -> None:
        at = {flag.metric: flag.threshold for flag in FLAGS.values()}
        assert list_flags(at) == ()
        assert list_flags(dict.fromkeys(at)) == ()
        assert list_flags({**at, "hamming_other_subject": 4, "n_unique_values": 15}) == ("few-levels", "near-duplicate")


class TestHash:
    @pytest.mark.parametrize("shape", [(96, 80), (60, 64, 40)])
    def test_a_copy_keeps_its_hash_and_another_image_has_another(self, shape: tuple[int, ...]) -> None:
        first, second = ((anatomy(*shape, seed=s) + RNG.normal(0, 1, shape))[None] for s in (1, 2))
        own = compute_perceptual_hash(first)
        assert bits(own, compute_perceptual_hash(3.7 * first + 11)) == 0
        assert bits(own, compute_perceptual_hash(first + RNG.normal(0, 0.05 * np.ptp(first), first.shape))) <= 4
        assert bits(own, compute_perceptual_hash(zoom(first, (1, *[0.5] * len(shape)), order=1))) <= 4
        assert bits(own, compute_perceptual_hash(second)) > 12

    def test_a_copy_in_another_format_keeps_its_hash(self, tmp_path: Path) -> None:
        picture = np.clip(anatomy(120, 100, seed=3) + RNG.normal(0, 2, (120, 100)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=60)
        (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
        Image.fromarray(picture).save(tmp_path / "b.png")
        save(
            dataset(
                16 * picture.astype(np.uint16),
                ImageOrientationPatient=None,
                ImagePositionPatient=None,
                Modality="DX",
                SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1",
            ),
            tmp_path / "c.dcm",
        )
        index = build_index(tmp_path, "xray")
        hashes = [measure_quality(index.open(record)).hash for record in index.records]
        assert len(hashes) == 3
        assert max(bits(hashes[0], other) for other in hashes) <= 4

    def test_a_volume_written_in_another_direction_keeps_its_hash(self, tmp_path: Path) -> None:
        array = anatomy(40, 44, 20).astype(np.float32)
        write_nifti(tmp_path / "a.nii.gz", array, np.diag([1.0, 1, 3, 1]))
        write_nifti(tmp_path / "b.nii.gz", array[::-1], np.diag([-1.0, 1, 3, 1]))
        one, two = (compute_perceptual_hash(read_volume(tmp_path / f"{name}.nii.gz").array) for name in "ab")
        assert one == two

    def test_slices_of_any_direction_and_number_have_a_hash_that_tells_them_apart(self) -> None:
        for axis in range(3):
            one, two = (np.expand_dims(anatomy(64, 64, seed=s), axis)[None] for s in (1, 2))
            assert bits(compute_perceptual_hash(one), compute_perceptual_hash(two)) > 12

    def test_an_image_that_shows_nothing_has_none(self) -> None:
        corner = np.zeros((1, 40, 40, 40))
        corner[0, :3, :3, :3] = 1
        assert compute_perceptual_hash(corner) is None
        assert compute_perceptual_hash(np.zeros((1, 2, 3))) is None
