from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medim.data.readers import read_volume
from medim.export import orientation
from medim.export.orientation import count_misplaced_markers
from medim.types import Volume


def test_every_marker_lies_where_it_does_in_the_patient_whatever_way_the_series_was_written() -> None:
    assert count_misplaced_markers() == (0, 48)


def test_an_axis_that_a_reader_mirrors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrored(path: Path) -> Volume:
        volume = read_volume(path)
        return replace(volume, array=np.flip(volume.array, 1))

    monkeypatch.setattr(orientation, "read_volume", mirrored)
    assert count_misplaced_markers()[0] >= 24


def test_rows_and_columns_whose_spacing_is_swapped_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orientation, "SPACING", (0.4, 0.9, 2.0))
    written = orientation._write_phantom_series

    def swapped(folder: Path, turned: tuple[int, ...]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(orientation, "SPACING", (0.9, 0.4, 2.0))
            written(folder, turned)

    monkeypatch.setattr(orientation, "_write_phantom_series", swapped)
    assert count_misplaced_markers()[0] > 0
