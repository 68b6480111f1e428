"""Preprocessing in blocks: the same bits as whole arrays, and less memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from medim.data.preprocessing import geometry, steps
from medim.data.preprocessing.steps import compute_std, normalise, preprocess
from medim.data.readers import read_volume
from medim.tasks.segmentation import to_label_map
from medim.types import Array, Volume

GRID_STEPS = [
    {"op": "orthogonalise_affine"},
    {"op": "ras"},
    {"op": "resample", "spacing": [1.3, 2.1, 4.5]},
    {"op": "clip_percentiles"},
    {"op": "normalise"},
]


def make_volume(array: Array) -> Volume:
    return Volume(array=array, affine=np.eye(4), native_affine=np.eye(4), native_shape=array.shape[1:])


@pytest.mark.parametrize("n", [1, 7, 128, 129, 1000, 4097, 65_537, 300_001])
def test_a_standard_deviation_in_parts_has_the_bits_of_numpy(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = (np.random.default_rng(n).standard_normal((2, n)) * 300 + 1000).astype(np.float32)
    means, expected = values.mean(axis=1, dtype=np.float64), values.std(axis=1, dtype=np.float64)
    for block in (512, 1 << 22):
        monkeypatch.setattr(steps, "BLOCK_VALUES", block)
        assert [compute_std(channel, mean) for channel, mean in zip(values, means, strict=True)] == expected.tolist()


@pytest.mark.parametrize("name", ["mri-acdc", "mri-hippocampus", "mri-left-atrium"])
def test_preprocessing_in_blocks_has_the_bits_of_whole_arrays(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    volume = read_volume(next(iter(sorted((shared_data / name / "imagesTr").glob("*.nii.gz")))))
    whole = preprocess(volume, GRID_STEPS)
    flat = volume.array.reshape(1, -1)
    shift, scale = flat.mean(axis=1, dtype=np.float64), flat.std(axis=1, dtype=np.float64)
    expected = ((flat - shift[:, None]) / scale[:, None]).astype(np.float32).reshape(volume.array.shape)
    logits = np.random.default_rng(0).standard_normal((3, *whole.shape)).astype(np.float32)
    labels = to_label_map(logits, whole, volume)
    np.testing.assert_array_equal(normalise(volume).array, expected)
    for module in (geometry, steps):
        monkeypatch.setattr(module, "BLOCK_VALUES", 1000)
    np.testing.assert_array_equal(preprocess(volume, GRID_STEPS).array, whole.array)
    np.testing.assert_array_equal(to_label_map(logits, whole, volume), labels)


def test_labels_of_one_class_at_a_time_are_those_of_all() -> None:
    volume = make_volume(np.zeros((1, 6, 7, 8), np.float32))
    logits = np.random.default_rng(0).integers(0, 3, (5, 6, 7, 8)).astype(np.float32)  # with ties
    logits[2, 0, 0, 0] = logits[4, 1, 1, 1] = logits[0, 2, 2, 2] = logits[3, 2, 2, 2] = np.nan
    np.testing.assert_array_equal(to_label_map(logits, volume, volume), logits.argmax(axis=0))


def test_preprocessing_takes_few_copies_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (geometry, steps):
        monkeypatch.setattr(module, "BLOCK_VALUES", 1 << 14)
    volume = make_volume(np.random.default_rng(0).standard_normal((1, 128, 128, 64)).astype(np.float32))
    logits = np.zeros((4, 64, 64, 32), np.float32)
    processed = preprocess(volume, [{"op": "resample", "spacing": [2, 2, 2]}])
    peaks = []
    for work in (lambda: normalise(volume), lambda: to_label_map(logits, processed, volume)):
        tracemalloc.start()
        work()
        peaks.append(tracemalloc.get_traced_memory()[1] / volume.array.size)
        tracemalloc.stop()
    assert peaks[0] < 5, "bytes per voxel: the result; it was 20"
    assert peaks[1] < 13, "bytes per voxel: two classes, labels and half a class; it was 40"
