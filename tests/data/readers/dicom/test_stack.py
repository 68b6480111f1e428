"""Order and spacing of slices, compared with highdicom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from highdicom.spatial import get_series_volume_positions
from pydicom import Dataset

from medim.data.preprocessing.geometry import compute_nearest_rotation
from medim.data.readers.base import ReadError
from medim.data.readers.dicom.stack import stack_frames
from medim.data.readers.inspection import FramePlane
from medim.types import Array

N_SLICES = 7


def make_series(axes: Array, gap: float, missing: tuple[int, ...] = (), shear: float = 0.0) -> list[Dataset]:
    """Headers of a shuffled series with these column, row and slice directions."""
    datasets = []
    for number in np.random.default_rng(0).permutation([n for n in range(N_SLICES) if n not in missing]):
        dataset: Any = Dataset()
        dataset.ImageOrientationPatient = [float(x) for x in (*axes[:, 0], *axes[:, 1])]
        position = np.array([10.0, -20.0, 30.0]) + number * (gap * axes[:, 2] + shear * axes[:, 0])
        dataset.ImagePositionPatient = [float(x) for x in position]
        dataset.PixelSpacing = [0.8, 0.9]
        dataset.Rows, dataset.Columns = 64, 48
        dataset.FrameOfReferenceUID = "1.2.3"
        dataset.SeriesInstanceUID = "1.2.4"
        dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        datasets.append(dataset)
    return datasets


def make_frames(datasets: list[Dataset]) -> list[FramePlane]:
    return [
        FramePlane(
            position=tuple(map(float, d.ImagePositionPatient)),
            orientation=tuple(map(float, d.ImageOrientationPatient)),
            spacing=(0.8, 0.9),
            size=(64, 48),
            thickness=1.0,
            keys=(),
        )
        for d in datasets
    ]


def random_axes(seed: int) -> Array:
    return compute_nearest_rotation(np.random.default_rng(seed).normal(size=(3, 3)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("gap", [0.3, 1.0, 6.6])
def test_order_and_spacing_of_tilted_series_are_those_of_highdicom(seed: int, gap: float) -> None:
    datasets = make_series(random_axes(seed), gap)
    spacing, places = get_series_volume_positions(datasets, index_convention=("R", "D"))  # as in ITK
    stack = stack_frames(make_frames(datasets))
    assert places is not None
    assert [places[index] for index in stack.order] == list(range(N_SLICES))
    assert spacing == pytest.approx(np.linalg.norm(stack.affine[:3, 2]), abs=1e-6)


@pytest.mark.parametrize("options", [{"missing": (3,)}, {"missing": (1, 2)}, {"shear": 0.5}])
def test_gapped_and_sheared_series_are_refused_as_by_highdicom(options: dict[str, Any]) -> None:
    datasets = make_series(random_axes(1), 2.0, **options)
    assert get_series_volume_positions(datasets) == (None, None)
    with pytest.raises(ReadError) as error:
        stack_frames(make_frames(datasets))
    assert error.value.reason == ("sheared" if "shear" in options else "missing-slices")
