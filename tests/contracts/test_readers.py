"""What every entry of READERS promises."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from medim.data.readers import READERS, Reader, ReadError, find_reader
from tests.contracts.samples import SAMPLES, Sample
from tests.data.synthetic import scan

ALL = [(reader, sample) for reader in READERS for sample in SAMPLES.get(reader.name, [])]
samples = pytest.mark.parametrize(("reader", "sample"), ALL, ids=[f"{r.name}-{s[0]}" for r, s in ALL])


def test_every_reader_has_a_name_of_its_own_and_samples() -> None:
    names = [reader.name for reader in READERS]
    assert len(set(names)) == len(names)
    assert set(names) == set(SAMPLES), "add a sample file of a new reader to SAMPLES"


@samples
def test_a_reader_accepts_its_files_and_no_other_does(reader: Reader, sample: Sample, tmp_path: Path) -> None:
    name, _, write = sample
    path = write(tmp_path / name)
    assert [other for other in READERS if other.accepts(path)] == [reader]
    assert find_reader(path) is reader


@samples
def test_what_is_found_is_what_is_read(reader: Reader, sample: Sample, tmp_path: Path) -> None:
    name, modality, write = sample
    path = write(tmp_path / name)
    found, refused = scan(reader, [path], modality)
    assert found
    assert refused == []
    for image in found:
        volume = reader.read(path, image.item)
        assert volume.array.dtype == np.float32
        assert volume.array.shape == (1, *image.shape)
        assert len(image.shape) == (3 if modality == "mri" else 2)
        assert len(volume.native_shape) == volume.spatial_dims
        np.testing.assert_array_equal(volume.affine, image.affine)
        assert volume.affine.shape == volume.native_affine.shape == (4, 4)
        if volume.spatial_dims == 3:  # RAS+: each axis runs mainly along its own direction, upwards
            assert (np.diag(volume.affine)[:3] > 0).all()
        assert volume.array.flags.c_contiguous
        assert image.files == (path,)


@samples
@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6])
def test_a_cut_file_is_refused_and_never_a_traceback(
    reader: Reader, sample: Sample, tmp_path: Path, part: float
) -> None:
    name, modality, write = sample
    path = write(tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    found, refused = scan(reader, [path], modality)
    assert found == []
    assert [one.path for one in refused] == [path]
    assert refused[0].reason.replace("-", "").isalpha()
    assert str(tmp_path) not in refused[0].detail
    with pytest.raises(ReadError):
        reader.read(path, "train/0")


@samples
def test_damaged_bytes_are_an_image_of_the_right_shape_or_refused(
    reader: Reader, sample: Sample, tmp_path: Path
) -> None:
    name, modality, write = sample
    path = write(tmp_path / name)
    whole, random = path.read_bytes(), np.random.default_rng(0)
    for _ in range(25):
        damaged = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 8)):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        found, refused = scan(reader, [path], modality)
        assert found or refused
        for image in found:
            with suppress(ReadError):
                assert reader.read(path, image.item).array.shape == (1, *image.shape)


@samples
def test_a_missing_file_is_an_error_of_its_own(reader: Reader, sample: Sample, tmp_path: Path) -> None:
    with pytest.raises(ReadError) as caught:
        reader.read(tmp_path / sample[0])
    assert caught.value.reason == "unreadable"
