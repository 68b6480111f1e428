"""Built-in example cohort: simulated subjects for tutorials and tests.

Every subject is the MNI152 template under a random deformation, half of them with enlarged ventricles, scanned once or
twice with individual contrast, coil bias and noise (`brain`). The images show no real person and may be shared.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medim.data.example import brain
from medim.data.example.scan import ExampleScan
from medim.files import write_bytes, write_csv, write_json
from medim.output_folder import output_folder
from medim.types import UsageError, UserError

ExampleFormat = Literal["nifti", "dicom"]
EXAMPLE_FORMATS: tuple[ExampleFormat, ...] = ("nifti", "dicom")
TISSUE_LABELS = {0: "background", 1: "grey", 2: "white", 3: "other"}
LICENCE = (
    "Simulated from the ICBM 152 nonlinear symmetric 2009a template. Copyright (C) 1993-2004 Louis Collins, McConnell "
    "Brain Imaging Centre, Montreal Neurological Institute, McGill University. Permission to use, copy, modify, and "
    "distribute this software and its documentation for any purpose and without fee is hereby granted, provided that "
    "the above copyright notice appear in all copies."
)


def plan_cohort(subjects: int, *, seed: int) -> tuple[tuple[bool, int], ...]:
    """Plan the class and the number of scans of each subject: half are enlarged, and a third have two scans.

    The assignment is drawn block by block, so that a smaller cohort is a prefix of a larger one with the same seed.
    """
    enlarged = [i % 2 == np.random.default_rng([seed, 1, i // 2]).integers(2) for i in range(subjects)]
    has_two_scans = [i % 3 == np.random.default_rng([seed, 2, i // 3]).integers(3) for i in range(subjects)]
    return tuple((bool(e), 1 + int(t)) for e, t in zip(enlarged, has_two_scans, strict=True))


def simulate_scans(subjects: int = 24, *, spacing: float = 2.0, seed: int = 0) -> Iterator[ExampleScan]:
    """Simulate the scans of the cohort, subject by subject.

    Args:
        subjects: number of subjects.
        spacing: voxel size in mm; the field of view is fixed.
        seed: random seed; each scan depends only on (seed, subject, session, spacing).
    """
    template = brain.load_template(spacing)
    grid = brain.VoxelGrid.around_brain(margin=0.0, spacing=spacing)
    for number, (enlarged, sessions) in enumerate(plan_cohort(subjects, seed=seed), start=1):
        anatomy = brain.draw_anatomy(template, np.random.default_rng([seed, 3, number]), enlarged=enlarged)
        for session in range(1, sessions + 1):
            rng = np.random.default_rng([seed, 4, number, session])
            maps = brain.deform_template(template, brain.compose_displacements(anatomy, brain.draw_pose(rng)), grid)
            yield ExampleScan(
                subject=f"EX-{number:03d}",
                session=session,
                label="enlarged" if enlarged else "normal",
                image=brain.draw_scan(maps, grid, rng),
                tissue=brain.label_tissues(maps),
                affine=grid.affine,
            )


def make_example(
    out: Path,
    *,
    subjects: int = 24,
    spacing: float = 2.0,
    formats: Sequence[ExampleFormat] = ("nifti",),
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the example cohort; the same arguments give the same bytes.

    `out/nifti` has the Medical Segmentation Decathlon layout (`dataset.json`, `imagesTr/`, `labelsTr/`), `out/dicom`
    one folder of MR Image Storage slices per scan. Both contain `subjects.csv` (image, subject) and `labels.csv`
    (image, label), with the file name or the series folder as `image`. The folders are `scan-501` onwards, in the
    order of the files: names with a patient ID are replaced by pseudonyms in an index, which then has another order.

    Args:
        out: a new or empty folder.
        subjects: number of subjects, 1 to 999; about a third have two scans.
        spacing: voxel size in mm, 1 to 8.
        formats: "nifti", "dicom" or both.
        seed: random seed, 0 or more.
        overwrite: replace an earlier cohort.
        progress: called with (scans written, total scans).

    Returns:
        `out`.

    Raises:
        UsageError: an argument is out of its range.
        UserError: `out` is not empty or cannot be written, or nilearn is missing.

    Examples:
        >>> make_example(Path("cohort"), subjects=6, spacing=4.0)  # doctest: +SKIP
        PosixPath('cohort')
    """
    _check_example_arguments(subjects, spacing, formats, seed)
    total = sum(sessions for _, sessions in plan_cohort(subjects, seed=seed))
    with output_folder(out, "example", overwrite=overwrite) as folder:
        try:
            rows: list[tuple[str, str, str]] = []
            for done, scan in enumerate(simulate_scans(subjects, spacing=spacing, seed=seed), start=1):
                if "nifti" in formats:
                    _write_scan_nifti(scan, folder / "nifti")
                if "dicom" in formats:
                    from medim.data.example.dicom import write_dicom_series

                    write_dicom_series(scan, folder / "dicom" / _name_series(done), seed=seed)
                rows.append((scan.name, scan.subject, scan.label))
                if progress is not None:
                    progress(done, total)
            _write_metadata(folder, rows, formats)
        except OSError as error:
            raise UserError(
                f"{out}: could not be written ({error}). Free some space or choose another --out."
            ) from error
    return out


def _check_example_arguments(subjects: int, spacing: float, formats: Sequence[str], seed: int) -> None:
    if not 1 <= subjects <= 999:
        raise UsageError(f"The number of subjects must be 1 to 999, got {subjects}.")
    if not 1 <= spacing <= 8:
        raise UsageError(f"The spacing must be 1 to 8 mm, got {spacing}.")
    if seed < 0:
        raise UsageError(f"The seed must be 0 or more, got {seed}.")
    unknown_formats = sorted(set(formats) - set(EXAMPLE_FORMATS))
    if unknown_formats or not formats:
        raise UsageError(
            f"The format must be one or more of {', '.join(EXAMPLE_FORMATS)}; got "
            f"{', '.join(unknown_formats) or 'none'}."
        )


def _name_series(number: int) -> str:
    """Name the folder of the n-th scan by a number that is in no patient ID of up to 500 subjects."""
    return f"scan-{500 + number}"


def _write_scan_nifti(scan: ExampleScan, folder: Path) -> None:
    import nibabel

    nifti: Any = nibabel.Nifti1Image  # nibabel has no type annotations
    for array, kind in ((scan.image, "imagesTr"), (scan.tissue, "labelsTr")):
        image = nifti(array, scan.affine)
        image.set_sform(scan.affine, code="mni")
        image.set_qform(scan.affine, code="mni")
        image.header.set_xyzt_units("mm", "sec")
        # mtime 0 and no file name in the gzip header, so that equal voxels give equal bytes
        write_bytes(folder / kind / f"{scan.name}.nii.gz", gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def _write_metadata(staging: Path, rows: Sequence[tuple[str, str, str]], formats: Sequence[str]) -> None:
    """Write the tables of each format, and `dataset.json` of the NIfTI folder."""
    if "nifti" in formats:
        _write_cohort_tables(staging / "nifti", rows, suffix=".nii.gz")
        _write_dataset_json(staging / "nifti", [name for name, _, _ in rows])
    if "dicom" in formats:
        series_rows = [(_name_series(number), *row[1:]) for number, row in enumerate(rows, start=1)]
        _write_cohort_tables(staging / "dicom", series_rows, suffix="")


def _write_cohort_tables(folder: Path, rows: Sequence[tuple[str, str, str]], *, suffix: str) -> None:
    write_csv(folder / "subjects.csv", ("image", "subject"), [(name + suffix, subject) for name, subject, _ in rows])
    write_csv(folder / "labels.csv", ("image", "label"), [(name + suffix, label) for name, _, label in rows])


def _write_dataset_json(folder: Path, names: Sequence[str]) -> None:
    files = [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names]
    content = {
        "name": "Example",
        "description": "Simulated T1-weighted brains with tissue labels: the built-in example cohort of medim",
        "reference": "https://www.bic.mni.mcgill.ca/ServicesAtlases/ICBM152NLin2009",
        "licence": LICENCE,
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in TISSUE_LABELS.items()},
        "numTraining": len(files),
        "numTest": 0,
        "training": files,
        "test": [],
    }
    write_json(folder / "dataset.json", content)
