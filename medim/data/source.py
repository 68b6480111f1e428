"""Resolve `--data`: image files, an index, a store, the name of a public data set, or the built-in cohort."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from medim.data.index.index import Index, build_index, is_index, read_modality
from medim.data.index.tables import TableFile
from medim.data.parallel import count_cpus
from medim.data.public.fetch import find_public_set, resolve_data_argument
from medim.output_folder import acquire_lock
from medim.privacy import format_path
from medim.types import Modality, UserError

log = logging.getLogger(__name__)


def find_modality(data: Path | None) -> Modality | None:
    """Find the modality that a data source records; None for images without an index.

    Args:
        data: as in `open_source`.

    Examples:
        >>> find_modality(None)  # the built-in cohort
        'mri'
    """
    if data is None:
        return "mri"
    if is_index(data):
        return read_modality(data)
    public_set = find_public_set(data)
    return public_set.modality if public_set else None


def open_source(
    data: Path | None,
    modality: Modality,
    *,
    labels: Path | TableFile | None = None,
    subjects: Path | TableFile | None = None,
    keep_names: bool = False,
) -> tuple[Index, Path | None]:
    """Open or build the index of a data source.

    Args:
        data: images in any supported format, a folder written by `medim index` or `medim preprocess`, the name of a
            public data set downloaded by `medim fetch`, or None for the built-in cohort.
        modality: modality of the images.
        labels: CSV with labels to join.
        subjects: CSV with subjects to join.
        keep_names: as in `build_index`.

    Returns:
        The index, and the folder of the store if `data` is a store.

    Raises:
        UserError: no usable images; a public data set that was not downloaded; no `data` and no built-in cohort for
            the modality; or a table to join to an existing index.
    """
    if data is None:
        data = _prepare_builtin_cohort(modality)
    data = resolve_data_argument(data, modality)
    # An index without its summary.json is refused by `Index.read`, and not searched for images.
    if is_index(data) or any((data / f"index.{kind}").is_file() for kind in ("parquet", "csv")):
        index = Index.read(data)
        if index.modality != modality:
            raise UserError(
                f"{format_path(data)}: expected an index of {modality} images, got {index.modality}. "
                f"Use {modality} images, or a configuration, encoder or package for {index.modality}."
            )
        option = "--labels" if labels else "--subjects" if subjects else "--keep-names" if keep_names else None
        if option:
            raise UserError(
                f"{format_path(data)}: {option} has no effect on an existing index. "
                f"Give {option} to `medim index`, or give the images themselves to --data."
            )
        index.log_unidentified()
        return index, data if (data / "store.json").is_file() else None
    index = build_index(data, modality, labels=labels, subjects=subjects, keep_names=keep_names, jobs=count_cpus())
    index.log_unidentified()
    return index, None


def _prepare_builtin_cohort(modality: Modality) -> Path:
    if modality != "mri":
        raise UserError(
            "--data: X-rays have no built-in cohort. Give a folder of DICOM or PNG files, or run "
            "`medim fetch pneumoniamnist` and give --data pneumoniamnist."
        )
    from medim.data.example.cohort import make_example
    from medim.data.loading.store import locate_default_store

    folder = locate_default_store().parent / "example"
    with acquire_lock(folder.with_name(".example.lock"), wait=True):
        if not (folder / "nifti" / "dataset.json").is_file():
            log.info("no --data: creating the built-in cohort in the cache (simulated from the MNI152 template)")
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier version that was killed
            make_example(folder)
        else:
            log.info("no --data: using the built-in cohort (simulated subjects from the MNI152 template)")
    return folder / "nifti"
