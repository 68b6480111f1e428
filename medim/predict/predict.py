"""`medim predict` and `medim embed`: images in, answers out. Runs in the light install."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from medim.data.index.index import AllRejectedError, ImageRecord, Index, Rejection, build_index, is_index
from medim.data.index.records import write_rejections
from medim.data.readers import ReadError
from medim.data.readers.dicom.sandbox import DecodingLimits, sandboxed_decoding
from medim.files import prepare_output_folder, write_bytes, write_csv, write_json
from medim.inference.network import Predictor
from medim.inference.ood import OODResult
from medim.package.package import Package
from medim.predict.embeddings import WRITERS
from medim.predict.outputs import write_map, write_mask
from medim.tasks import ENCODER
from medim.types import Array, Modality, UsageError, UserError, Volume

SCHEMA_VERSION = 1
AnswerFormat = Literal["nifti", "dicom"]
AnswerWriter = Callable[
    [Path, Index, ImageRecord, Volume, Array, OODResult], dict[str, Any]
]  # file without suffix, ...: its row
PredictInputs = Index | Path | Sequence[Path]
AnswerProgress = Callable[[int, int], None]  # images done, images in all
DEFAULT_LIMITS = DecodingLimits()


def predict(
    package: Package | Predictor,
    inputs: PredictInputs,
    out: Path,
    *,
    as_: AnswerFormat = "nifti",
    labelmap: bool = False,
    overwrite: bool = False,
    progress: AnswerProgress | None = None,
    limits: DecodingLimits = DEFAULT_LIMITS,
) -> list[dict[str, Any]]:
    """Segment or classify every image of a source.

    Writes a mask (`.nii.gz` on the image's own grid; `.png` in 2D) or a JSON of probabilities an image, named after the
    image's key; `predictions.csv`; `rejected.csv` with a reason for each file that got no answer; `summary.json` last.
    As DICOM, a segmentation (`.seg.dcm`) with a report of its volumes, or a report of probabilities (`.sr.dcm`), which
    hold as much of the patient as the image does. DICOM images are held against the rules of the package first.
    `ood_score`, `ood` and `ood_by` say how far an image is from those trained on; see `medim.inference.ood`.

    Args:
        package: a segmenter or classifier.
        inputs: an index, or anything `build_index` takes.
        out: folder for the results.
        as_: format of the answers.
        labelmap: write a segmentation as one image of label numbers, which older viewers do not know.
        overwrite: empty `out` first.
        progress: told after each image.
        limits: of what a DICOM image may cost; it is decoded in a process of its own.

    Returns:
        The rows of `predictions.csv`.

    Raises:
        UserError: the package is an encoder, or `out` is taken.
        AllRejectedError: no input got an answer (exit code 4); `rejected.csv` is written all the same.
    """
    network = _get_predictor(package)
    if network.kind == ENCODER:
        raise UserError("predict: expected a segmenter or classifier, got an encoder. Use `medim embed`.")
    write_row = _select_writer(package, as_, labelmap=labelmap)
    folder = prepare_output_folder(out, overwrite=overwrite)
    rows = []
    with sandboxed_decoding(limits):
        index = _open_index(inputs, network.modality, folder / "rejected.csv")
        names = _make_file_names(index.records)
        rejections: list[Rejection] = [*index.rejected]
        for record, volume, answer, ood_result in _iterate_answers(package, index, rejections, progress, limits):
            try:
                row = write_row(folder / names[record.image], index, record, volume, answer, ood_result)
                rows.append({**row, **ood_result.columns})
            except ReadError as error:
                rejections.append(Rejection(record.path, error.reason, error.detail))
    write_rejections(folder / "rejected.csv", rejections)
    if not rows:
        raise _build_rejection_error(index, rejections)
    write_csv(folder / "predictions.csv", list(rows[0]), (list(row.values()) for row in rows))
    counts = {"images": len(index.records), "predicted": len(rows), "rejected": len(rejections)}
    write_json(
        folder / "summary.json",
        {"schema_version": SCHEMA_VERSION, "package": _describe_package(package), "counts": counts},
    )
    return rows


def embed_images(
    package: Package | Predictor,
    inputs: PredictInputs,
    out: Path,
    *,
    maps: Path | None = None,
    overwrite: bool = False,
    progress: AnswerProgress | None = None,
    limits: DecodingLimits = DEFAULT_LIMITS,
) -> tuple[tuple[str, ...], Array]:
    """Write the features of every image of a source, a row an image.

    `.npz` holds `image` (keys), `subject` (pseudonyms) and `features` (N, d) float32; `.csv` and `.parquet` hold
    columns `image`, `subject`, `f0`, `f1`, ...; all hold `ood_score`, `ood` and `ood_by`, see
    `medim.inference.ood`. Files without features stand with their reason in `<out>.rejected.csv`.
    With `maps`, each image also gets its mutual-information map on its own grid (see `write_map`), named after the
    image's key, and `maps.csv` a row: image, file, mean, lowest and highest score.

    Args:
        package: an encoder.
        inputs: an index, or anything `build_index` takes.
        out: the file to write, `.npz`, `.csv` or `.parquet`.
        maps: folder for the maps; None writes none.
        overwrite: empty `maps` first.
        progress: told after each image.
        limits: see `predict`.

    Returns:
        Image keys and features (N, d).

    Raises:
        UserError: the package is no encoder, has no local critic and a map is asked for, `maps` is taken, or pyarrow is
            missing for `.parquet`.
        UsageError: another suffix.
        AllRejectedError: no input could be used.
    """
    network = _get_predictor(package)
    if network.kind != ENCODER:
        raise UserError(f"embed: expected an encoder, got a {network.kind}. Export the pretraining run, and use that.")
    writer = WRITERS.get(out.suffix)
    if writer is None:
        raise UsageError(f"--out {out}: expected a file ending in {', '.join(WRITERS)}.")
    if maps is not None:
        network.require_score_map()
        prepare_output_folder(maps, overwrite=overwrite)
    rejections_file = out.with_name(f"{out.name}.rejected.csv")
    answers, ood_results, rows = [], [], []
    with sandboxed_decoding(limits):
        index = _open_index(inputs, network.modality, rejections_file)
        rejections: list[Rejection] = [*index.rejected]
        names = _make_file_names(index.records)
        for record, volume, answer, ood_result in _iterate_answers(package, index, rejections, progress, limits):
            answers.append((record, answer))
            ood_results.append(ood_result)
            if maps is not None:
                path, scores = write_map(maps / names[record.image], network.predict_score_map(volume), volume)
                rows.append({"image": record.image, "file": path.name, **scores})
    if rejections:
        write_rejections(rejections_file, rejections)
    if not answers:
        raise _build_rejection_error(index, rejections)
    features = np.stack([answer for _, answer in answers]).astype(np.float32)
    images = tuple(record.image for record, _ in answers)
    write_bytes(out, writer(images, tuple(record.subject for record, _ in answers), features, ood_results))
    if maps is not None:
        write_csv(maps / "maps.csv", list(rows[0]), (list(row.values()) for row in rows))
    return images, features


def _get_predictor(package: Package | Predictor) -> Predictor:
    return package.network if isinstance(package, Package) else package


def _describe_package(package: Package | Predictor) -> dict[str, str] | None:
    """Which package gave an answer; None for a run under torch."""
    if not isinstance(package, Package):
        return None
    return {"name": package.contract.name, "version": package.contract.version, "sha256": package.sha256}


def _open_index(inputs: PredictInputs, modality: Modality, rejections_file: Path) -> Index:
    if isinstance(inputs, Index):
        index = inputs
    else:
        paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
        try:
            is_single_index = len(paths) == 1 and is_index(paths[0])
            index = Index.read(paths[0]) if is_single_index else build_index(paths, modality)
        except AllRejectedError as error:
            write_rejections(rejections_file, error.index.rejected)
            raise
    if index.modality != modality:
        raise UserError(
            f"expected images of modality {modality}, got an index of {index.modality}. Use another package."
        )
    return index


def _iterate_answers(
    package: Package | Predictor,
    index: Index,
    rejections: list[Rejection],
    progress: AnswerProgress | None,
    limits: DecodingLimits,
) -> Iterator[tuple[ImageRecord, Volume, Array, OODResult]]:
    """Each image that can be answered, with its answer and how usual it is; the others join `rejections`."""
    network = _get_predictor(package)
    for number, record in enumerate(index.records, start=1):
        try:
            if (plan := index.plan_slices(record)) is not None:
                limits.check_plan(plan)
                if isinstance(package, Package):
                    package.contract.dicom_in.check_plan(plan)
            volume = index.open(record)
            answer, ood_result = network.predict_with_ood(volume)
        except UserError as error:
            reason, detail = getattr(error, "reason", "not-for-this-network"), getattr(error, "detail", str(error))
            rejections.append(Rejection(record.path, reason, detail))
        except MemoryError:
            rejections.append(Rejection(record.path, "too-much-memory", "the image does not fit into memory"))
        else:
            yield record, volume, answer, ood_result
        if progress is not None:
            progress(number, len(index.records))


def _select_writer(package: Package | Predictor, as_: str, *, labelmap: bool) -> AnswerWriter:
    """What writes an answer.

    Raises:
        UsageError: a format that does not exist, or an option that it does not have.
        UserError: the package cannot answer in that format.
    """
    if as_ not in get_args(AnswerFormat):
        raise UsageError(f"--format {as_}: expected {' or '.join(get_args(AnswerFormat))}.")
    if as_ == "dicom":
        if not isinstance(package, Package):
            raise UserError("--format dicom: expected a package, got a run. Run `medim export` first.")
        from medim.predict.dicom.writer import dicom_writer  # highdicom takes a second to import

        as_dicom: AnswerWriter = dicom_writer(package, labelmap=labelmap)
        return as_dicom
    if labelmap:
        raise UsageError("--labelmap: it is a kind of DICOM segmentation. Add --format dicom, or leave it out.")
    return partial(_write_answer, package)


def _write_answer(
    package: Package | Predictor,
    stem: Path,
    index: Index,
    record: ImageRecord,
    volume: Volume,
    answer: Array,
    ood_result: OODResult,
) -> dict[str, Any]:
    """Write an answer as NIfTI, PNG or JSON; its row of `predictions.csv`."""
    network = _get_predictor(package)
    columns = network.task.answer_columns(answer, volume, network.classes)
    if network.task.dense:
        path = write_mask(stem, answer, volume)
        return {"image": record.image, "file": path.name, **columns}
    path = stem.with_name(f"{stem.name}.json")
    content = {"schema_version": SCHEMA_VERSION, "image": record.image}
    content |= network.task.answer_content(columns, network.classes)
    write_json(path, {**content, **ood_result.columns, "package": _describe_package(package)})
    return {"image": record.image, "file": path.name, **columns}


def _make_file_names(records: Sequence[ImageRecord]) -> dict[str, str]:
    """A file name for each image key: plain characters, at most 100, no two alike even where case does not count."""
    names = {record.image: re.sub(r"[^A-Za-z0-9._-]+", "_", record.image).strip("._")[:100] for record in records}
    name_counts: dict[str, int] = {}
    for name in names.values():
        name_counts[name.lower()] = name_counts.get(name.lower(), 0) + 1
    reserved = {"", "summary", "predictions", "rejected"}
    for key, name in names.items():
        if name_counts[name.lower()] > 1 or name.lower() in reserved:
            names[key] = f"{name or 'image'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return names


def _build_rejection_error(index: Index, rejections: Sequence[Rejection]) -> AllRejectedError:
    first_rejection = f"{rejections[0].path}: {rejections[0].detail}" if rejections else "the source holds no image"
    message = (
        f"expected an image that this package can read, got none out of {len(rejections)}. First: {first_rejection}"
    )
    return AllRejectedError(message, replace(index, records=(), rejected=tuple(rejections)))
