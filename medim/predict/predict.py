"""Command `medim predict`; it runs in the light install."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from medim.data.index.index import AllRejectedError, ImageRecord, Index, Rejection
from medim.data.index.records import write_rejections
from medim.data.mask_classes import to_file_values
from medim.data.readers import ReadError
from medim.data.readers.sandbox import DecodingLimits, sandboxed_decoding
from medim.files import write_csv, write_json
from medim.inference.network import Predictor
from medim.output_folder import REJECTIONS_FILE, write_rejection_file
from medim.package.package import Package
from medim.predict.answer import Answer, AnswerWriter, PredictionRow
from medim.predict.images import (
    DEFAULT_LIMITS,
    AnswerIterator,
    AnswerProgress,
    PredictInputs,
    build_rejection_error,
    get_predictor,
    identify_inputs,
    iterate_answers,
    make_file_names,
    open_answer_folder,
    open_index,
)
from medim.predict.outputs import write_mask
from medim.predict.preview import PREVIEW_FOLDER, write_preview
from medim.predict.progress import JOURNAL, Entry, ProgressJournal, decode_rejections, encode_rejection, open_journal
from medim.tasks import ENCODER
from medim.types import UsageError, UserError

SCHEMA_VERSION = 2
AnswerFormat = Literal["nifti", "dicom"]


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `predict`.

    Attributes:
        output_format: output format.
        labelmap: write a segmentation as one label map (LABELMAP), which older viewers do not support.
        preview: write a picture of each image, with the contours of a segmentation, to `previews/`.
        withhold_unusual: reject an image that is out of distribution, and write no answer for it.
        overwrite: replace an earlier prediction when the new one is complete.
        resume: continue a prediction that was stopped, with the same package and images.
        progress: callback after each image.
        limits: limits for decoding an image, which runs in a separate process.
    """

    output_format: AnswerFormat = "nifti"
    labelmap: bool = False
    preview: bool = False
    withhold_unusual: bool = False
    overwrite: bool = False
    resume: bool = False
    progress: AnswerProgress | None = None
    limits: DecodingLimits = DEFAULT_LIMITS


def predict(
    package: Package | Predictor,
    inputs: PredictInputs,
    out: Path,
    options: PredictOptions | None = None,
    **changes: Any,
) -> list[PredictionRow]:
    """Apply a segmenter, a classifier or a regression model to all images of a source.

    For each image, a mask (`.nii.gz` on the native grid; `.png` in 2D) or a JSON file is written, named after the image
    key. `predictions.csv` lists the predictions, and `rejected.csv` the files without a prediction and the reason.
    `summary.json` is written last.

    In DICOM format, a segmentation (`.seg.dcm`) with a report of its volumes, or a report of probabilities (`.sr.dcm`)
    is written. These files contain the same patient attributes as the image. DICOM images are first checked against the
    rules of the package.

    The columns `ood_score`, `ood`, `ood_feature_group` and `ood_reason` contain the out-of-distribution score; see
    `medim.inference.ood`.

    Args:
        package: segmenter, classifier or regression model.
        inputs: index, or input of `build_index`.
        out: output folder.
        options: options of the prediction; None uses the defaults.
        **changes: single options by name, such as `resume=True`; they replace those of `options`.

    Returns:
        Rows of `predictions.csv`.

    Raises:
        UserError: the package is an encoder, `out` is not empty, or `withhold_unusual` is set for a package without
            an out-of-distribution detector.
        UsageError: `output_format` is unknown, or `labelmap` does not apply.
        AllRejectedError: there is no prediction for any input (exit code 4); `rejected.csv` is written.
    """
    options, network = replace(options or PredictOptions(), **changes), get_predictor(package)
    if network.kind == ENCODER:
        raise UserError("predict: expected a fine-tuned model, got an encoder. Use `medim embed`.")
    write_answer = _select_writer(package, options)
    try:
        with (
            open_answer_folder(out, "predict", inputs, overwrite=options.overwrite, resume=options.resume) as folder,
            sandboxed_decoding(options.limits),
        ):
            index = open_index(inputs, network.modality)
            choices = {name: getattr(options, name) for name in ("labelmap", "preview", "withhold_unusual")}
            settings = {"format": options.output_format, **choices, **identify_inputs(package, index)}
            iterator = partial(_iterate_answers, package, index, options)
            return _predict_index(package, index, folder, settings, write_answer, iterator)
    except AllRejectedError as error:
        write_rejection_file(out, "predict", error.write_rejections)
        raise


def _iterate_answers(
    package: Package | Predictor, index: Index, options: PredictOptions, journal: ProgressJournal
) -> Iterator[tuple[ImageRecord, Answer | Rejection]]:
    """Yield the answer for each image, or the rejection of an unusual image if its answer is withheld."""
    for record, answer in iterate_answers(package, index, journal, progress=options.progress, limits=options.limits):
        if options.withhold_unusual and isinstance(answer, Answer) and answer.ood_result.ood:
            yield record, Rejection(record.path, "unusual", f"no answer by --withhold-unusual: {answer.ood_result}")
        else:
            yield record, answer


def _predict_index(
    package: Package | Predictor,
    index: Index,
    folder: Path,
    settings: Mapping[str, object],
    write_answer: AnswerWriter,
    iterator: AnswerIterator,
) -> list[PredictionRow]:
    """Write the answers that the journal of the folder lacks, the tables and, last, the summary."""
    with open_journal(folder / JOURNAL, settings) as journal:
        names = make_file_names(index.records)
        journal.discard_missing(folder, partial(_list_answer_files, names, with_preview=bool(settings["preview"])))
        rows, rejections = _write_answers(iterator(journal), index, folder, journal, write_answer)
    if not rows:
        (folder / JOURNAL).unlink()
        raise build_rejection_error(index, rejections)
    write_rejections(folder / REJECTIONS_FILE, rejections)
    write_csv(folder / "predictions.csv", list(rows[0]), (list(row.values()) for row in rows))
    n_unusual = sum(row["ood"] is True for row in rows)
    counts = {"images": len(index.records), "predicted": len(rows), "unusual": n_unusual, "rejected": len(rejections)}
    summary = {"schema_version": SCHEMA_VERSION, "package": _describe_package(package), "counts": counts}
    write_json(folder / "summary.json", summary)
    return rows


def _list_answer_files(names: Mapping[str, str], image: str, entry: Entry, *, with_preview: bool) -> list[str]:
    """List the files of an image relative to the folder: answer, report and picture; none for a rejected image."""
    row = entry.get("row", {})
    pictures = [f"{PREVIEW_FOLDER}/{names[image]}.png"] if with_preview and row else []
    return [str(row[column]) for column in ("file", "report") if column in row] + pictures


def _write_answers(
    answers: Iterable[tuple[ImageRecord, Answer | Rejection]],
    index: Index,
    folder: Path,
    journal: ProgressJournal,
    write_answer: AnswerWriter,
) -> tuple[list[PredictionRow], list[Rejection]]:
    """Write the files of each answer; return the rows of `predictions.csv` and all rejections."""
    names = make_file_names(index.records)
    for record, answer in answers:
        if isinstance(answer, Rejection):
            journal.add(record.image, encode_rejection(answer))
            continue
        try:
            row = write_answer(folder / names[record.image], index, answer)
            journal.add(record.image, {"row": {**row, **answer.ood_result.columns_with_reason}})
        except ReadError as error:
            journal.add(record.image, encode_rejection(Rejection(record.path, error.reason, error.detail)))
    entries = [journal.entries[record.image] for record in index.records]
    return [entry["row"] for entry in entries if "row" in entry], [*index.rejected, *decode_rejections(entries)]


def _describe_package(package: Package | Predictor) -> dict[str, str] | None:
    """Describe the package by name, version and digest; None for a run under torch."""
    if not isinstance(package, Package):
        return None
    return {"name": package.contract.name, "version": package.contract.version, "sha256": package.sha256}


def _select_writer(package: Package | Predictor, options: PredictOptions) -> AnswerWriter:
    """Select the function that writes predictions in the format of the options, and pictures if they ask for them.

    Raises:
        UsageError: the format is unknown or has no option `labelmap`.
        UserError: the package does not support the format, or has no detector for `withhold_unusual`.
    """
    network = get_predictor(package)
    if options.withhold_unusual and network.ood_detector is None:
        raise UserError(
            "--withhold-unusual: this package has no out-of-distribution detector. Export a run that has one, or leave "
            "the option out."
        )
    write_answer = _select_format_writer(package, options.output_format, labelmap=options.labelmap)
    return partial(_write_with_preview, network, write_answer) if options.preview else write_answer


def _select_format_writer(package: Package | Predictor, output_format: str, *, labelmap: bool) -> AnswerWriter:
    if output_format not in get_args(AnswerFormat):
        raise UsageError(f"--format {output_format}: expected {' or '.join(get_args(AnswerFormat))}.")
    if output_format == "dicom":
        if not isinstance(package, Package):
            raise UserError("--format dicom: expected a package, got a run. Run `medim export` first.")
        from medim.predict.dicom.writer import dicom_writer  # highdicom takes a second to import

        return dicom_writer(package, labelmap=labelmap)
    if labelmap:
        raise UsageError("--labelmap applies only to DICOM segmentations. Add --format dicom, or omit --labelmap.")
    return partial(_write_answer, package)


def _write_with_preview(
    network: Predictor, write_answer: AnswerWriter, stem: Path, index: Index, answer: Answer
) -> PredictionRow:
    """Write a prediction and a picture of it."""
    row = write_answer(stem, index, answer)
    write_preview(stem.parent / PREVIEW_FOLDER / f"{stem.name}.png", network, answer)
    return row


def _write_answer(package: Package | Predictor, stem: Path, index: Index, answer: Answer) -> PredictionRow:
    """Write a prediction as NIfTI, PNG or JSON; return its row of `predictions.csv`."""
    network, image = get_predictor(package), answer.record.image
    columns = network.task.answer_columns(answer.prediction, answer.volume, network.classes)
    if network.task.dense:
        labels = to_file_values(answer.prediction, network.class_values)
        path = write_mask(stem, labels, answer.volume)
        return {"image": image, "file": path.name, **columns}
    path = stem.with_name(f"{stem.name}.json")
    content = {"schema_version": SCHEMA_VERSION, "image": image}
    content |= network.task.answer_content(columns, network.classes)
    write_json(path, {**content, **answer.ood_result.columns_with_reason, "package": _describe_package(package)})
    return {"image": image, "file": path.name, **columns}
