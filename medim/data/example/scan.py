"""Data class of one simulated scan of the example cohort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from medim.types import Array


@dataclass(frozen=True, eq=False, kw_only=True)
class ExampleScan:
    """One simulated scan.

    Attributes:
        subject: patient ID, "EX-001" onwards.
        session: 1, or 2 for the second scan of a subject.
        label: "enlarged" or "normal" ventricles.
        image: (X, Y, Z) int16, RAS+, magnitudes of at least 1.
        tissue: (X, Y, Z) uint8 on the same grid, see `cohort.TISSUE_LABELS`.
        affine: (4, 4) voxel index to mm of MNI space.
    """

    subject: str
    session: int
    label: Literal["enlarged", "normal"]
    image: Array
    tissue: Array
    affine: Array

    @property
    def name(self) -> str:
        """Name of the scan's files, such as `EX-001_1`."""
        return f"{self.subject}_{self.session}"
