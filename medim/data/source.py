"""What `--data` means: files, an index, a store, a public set's name, or nothing (the built-in cohort)."""

from __future__ import annotations

import logging
from pathlib import Path

from medim.data.index.index import Index, build_index
from medim.data.parallel import count_cpus
from medim.data.public.fetch import resolve_data_argument
from medim.files import prepare_output_folder
from medim.types import Modality, UserError

log = logging.getLogger(__name__)


def open_source(
    data: Path | None, modality: Modality, *, labels: Path | None = None, subjects: Path | None = None
) -> tuple[Index, Path | None]:
    """Index what the user has.

    Args:
        data: images in any form that a reader takes, a folder written by `medim index` or `medim preprocess`, the name
            of a public set that `medim fetch` brought, or None.
        modality: which images count.
        labels: CSV that joins labels.
        subjects: CSV that joins subjects.

    Returns:
        The index, and the folder of the store where `data` is one.

    Raises:
        UserError: nothing usable there; a public set that was not fetched; no `data` and no built-in cohort for the
            modality; or a table to join to an index that is already made.
    """
    if data is None:
        data = _prepare_builtin_cohort(modality)
    data = resolve_data_argument(data, modality)
    if (data / "index.parquet").is_file() or (data / "index.csv").is_file():
        index = Index.read(data)
        if index.modality != modality:
            raise UserError(
                f"{data}: expected an index of {modality} images, got {index.modality}. "
                f"Give --modality {index.modality}."
            )
        option = "--labels" if labels else "--subjects" if subjects else None
        if option:
            raise UserError(
                f"{data}: an index is already joined, so {option} would be ignored. "
                f"Give {option} to `medim index`, or the images themselves to --data."
            )
        return index, data if (data / "store.json").is_file() else None
    return build_index(data, modality, labels=labels, subjects=subjects, jobs=count_cpus()), None


def _prepare_builtin_cohort(modality: Modality) -> Path:
    if modality != "mri":
        raise UserError(
            "--data: X-rays have no built-in cohort. Give a folder of DICOM or PNG files, or run "
            "`medim fetch pneumoniamnist` and give --data pneumoniamnist."
        )
    from medim.data.example.cohort import make_example
    from medim.data.loading.store import locate_default_store

    folder = locate_default_store().parent / "example"
    if not (folder / "nifti" / "dataset.json").is_file():
        log.info("no --data: making the built-in cohort in the cache (simulated subjects from the MNI152 template)")
        make_example(prepare_output_folder(folder, overwrite=True))
    else:
        log.info("no --data: using the built-in cohort (simulated subjects from the MNI152 template)")
    return folder / "nifti"
