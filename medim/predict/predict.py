"""Commands `medim predict` and `medim embed`; they run in the light install."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from medim.data.index.index import AllRejectedError, ImageRecord, Index, Rejection, build_index, is_index
from medim.data.index.records import write_rejections
from medim.data.readers import ReadError
from medim.data.readers.base import check_memory
from medim.data.readers.sandbox import DecodingLimits, sandboxed_decoding
from medim.files import write_bytes, write_csv, write_json
from medim.inference.network import Predictor
from medim.output_folder import acquire_lock, output_folder, write_rejection_file
from medim.package.package import Package
from medim.predict.answer import Answer, AnswerWriter, PredictionRow
from medim.predict.embeddings import WRITERS, FeatureRow, decode_features, encode_features, stack_features
from medim.predict.outputs import write_map, write_mask
from medim.predict.progress import JOURNAL, Entry, ProgressJournal, open_journal
from medim.tasks import ENCODER
from medim.types import Array, Modality, UsageError, UserError

SCHEMA_VERSION = 2
AnswerFormat = Literal["nifti", "dicom"]


@dataclass(frozen=True)
class ImageSource:
    """Images to index.

    Attributes:
        paths: files and folders.
        keep_names: as in `build_index`.
    """

    paths: Sequence[Path]
    keep_names: bool = False


PredictInputs = Index | ImageSource | Path | Sequence[Path]
AnswerIterator = Callable[[ProgressJournal], Iterator[tuple[ImageRecord, Answer | Rejection]]]
AnswerProgress = Callable[[int, int], None]  # arguments: processed images, total number of images
DEFAULT_LIMITS = DecodingLimits()
# Peak memory of a prediction per voxel of the image, without the network: measured 14 for one of 67 million voxels
# that is resampled to 4 mm and segmented into 4 classes. Images that need more than the free memory are rejected.
BYTES_PER_VOXEL = 16


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `predict`.

    Attributes:
        output_format: output format.
        labelmap: write a segmentation as one label map (LABELMAP), which older viewers do not support.
        overwrite: replace an earlier prediction when the new one is complete.
        resume: continue a prediction that was stopped, with the same package and images.
        progress: callback after each image.
        limits: limits for decoding an image, which runs in a separate process.
    """

    output_format: AnswerFormat = "nifti"
    labelmap: bool = False
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

    The columns `ood_score`, `ood` and `ood_feature_group` contain the out-of-distribution score; see
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
        UserError: the package is an encoder, or `out` is not empty.
        UsageError: `output_format` is unknown, or `labelmap` does not apply.
        AllRejectedError: there is no prediction for any input (exit code 4); `rejected.csv` is written.
    """
    options, network = replace(options or PredictOptions(), **changes), _get_predictor(package)
    if network.kind == ENCODER:
        raise UserError("predict: expected a fine-tuned model, got an encoder. Use `medim embed`.")
    output_format, labelmap, limits = options.output_format, options.labelmap, options.limits
    write_answer = _select_writer(package, output_format, labelmap=labelmap)
    try:
        with (
            _open_folder(out, "predict", inputs, overwrite=options.overwrite, resume=options.resume) as folder,
            sandboxed_decoding(limits),
        ):
            index = _open_index(inputs, network.modality)
            settings = {"format": output_format, "labelmap": labelmap, **_identify_inputs(package, index)}
            iterate_answers = partial(_iterate_answers, package, index, progress=options.progress, limits=limits)
            return _predict_index(package, index, folder, settings, write_answer, iterate_answers)
    except AllRejectedError as error:
        write_rejection_file(out, "predict", error.write_rejections)
        raise


def _predict_index(
    package: Package | Predictor,
    index: Index,
    folder: Path,
    settings: Mapping[str, object],
    write_answer: AnswerWriter,
    iterate_answers: AnswerIterator,
) -> list[PredictionRow]:
    """Write the answers that the journal of the folder lacks, the tables and, last, the summary."""
    with open_journal(folder / JOURNAL, settings) as journal:
        rows, rejections = _write_answers(iterate_answers(journal), index, folder, journal, write_answer)
    if not rows:
        (folder / JOURNAL).unlink()
        raise _build_rejection_error(index, rejections)
    write_rejections(folder / "rejected.csv", rejections)
    write_csv(folder / "predictions.csv", list(rows[0]), (list(row.values()) for row in rows))
    counts = {"images": len(index.records), "predicted": len(rows), "rejected": len(rejections)}
    summary = {"schema_version": SCHEMA_VERSION, "package": _describe_package(package), "counts": counts}
    write_json(folder / "summary.json", summary)
    return rows


def embed_images(
    package: Package | Predictor,
    inputs: PredictInputs,
    out: Path,
    *,
    maps: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: AnswerProgress | None = None,
    limits: DecodingLimits = DEFAULT_LIMITS,
) -> tuple[tuple[str, ...], Array]:
    """Extract the features of all images of a source, one row per image.

    `.npz` files contain `image` (keys), `subject` (pseudonyms) and `features` (N, d) float32, `.csv` and `.parquet` the
    columns `image`, `subject`, `f0`, `f1`, ...; all contain the columns of `medim.inference.ood.OODResult`.
    Files without features are listed in `<out>.rejected.csv`.

    With `maps`, the mutual-information map of each image is written on its native grid (see `write_map`). `maps.csv`
    has one row per map: image, file, mean, lowest and highest score.

    Args:
        package: encoder.
        inputs: index, or input of `build_index`.
        out: output file with suffix `.npz`, `.csv` or `.parquet`.
        maps: output folder of the maps; None for no maps.
        overwrite: replace an earlier `out` and the result in `maps` when the new ones are complete.
        resume: continue an extraction that was stopped, with the same encoder and images.
        progress: callback after each image.
        limits: as in `predict`.

    Returns:
        Image keys and features (N, d).

    Raises:
        UserError: the package is not an encoder, or has no local critic for maps, `out` exists, or `maps` is not empty.
        UsageError: the suffix of `out` is unknown.
        AllRejectedError: all inputs were rejected.
    """
    network = _get_predictor(package)
    encode_rows = _select_encoding(network, out)
    rejections_file, journal_file = out.with_name(f"{out.name}.rejected.csv"), out.with_name(f".{out.name}.{JOURNAL}")
    _check_output_file(out, journal_file, overwrite=overwrite, resume=resume)
    if maps is not None:
        network.require_score_map()
    map_folders = (
        nullcontext() if maps is None else _open_folder(maps, "embed", inputs, overwrite=overwrite, resume=resume)
    )
    try:
        with sandboxed_decoding(limits), map_folders as map_folder:
            index = _open_index(inputs, network.modality)
            iterate_answers = partial(_iterate_answers, package, index, progress=progress, limits=limits)
            rows, rejections = _extract_features(package, index, journal_file, iterate_answers, map_folder)
            write_bytes(out, encode_rows(rows))
    except AllRejectedError as error:
        journal_file.unlink(missing_ok=True)
        error.write_rejections(rejections_file)
        raise
    journal_file.unlink()
    _replace_rejections(rejections_file, rejections)
    return tuple(row.image for row in rows), stack_features(rows)


def _extract_features(
    package: Package | Predictor,
    index: Index,
    journal_file: Path,
    iterate_answers: AnswerIterator,
    maps: Path | None,
) -> tuple[list[FeatureRow], list[Rejection]]:
    """Extract the features that the journal lacks; return rows and all rejections."""
    settings = {"maps": maps is not None, **_identify_inputs(package, index)}
    with open_journal(journal_file, settings) as journal:
        rows, rejections = _collect_features(iterate_answers(journal), index, _get_predictor(package), journal, maps)
    if not rows:
        raise _build_rejection_error(index, rejections)
    return rows, rejections


def _open_folder(
    out: Path, command: str, inputs: PredictInputs, *, overwrite: bool, resume: bool
) -> AbstractContextManager[Path]:
    """Lock a folder of answers that a stopped command can continue, see `output_folder`."""
    paths = _list_input_paths(inputs)
    return output_folder(out, command, overwrite=overwrite, resume=resume, inputs=paths, resumable=True)


def _select_encoding(network: Predictor, out: Path) -> Callable[[Sequence[FeatureRow]], bytes]:
    """Select the function that encodes features for a suffix.

    Raises:
        UserError: the network is not an encoder.
        UsageError: the suffix is unknown.
    """
    if network.kind != ENCODER:
        raise UserError(f"embed: expected an encoder, got a {network.kind}. Use the export of a pretraining run.")
    encode_rows = WRITERS.get(out.suffix)
    if encode_rows is None:
        raise UsageError(f"--out {out}: expected a file ending in {', '.join(WRITERS)}.")
    return encode_rows


def _replace_rejections(file: Path, rejections: Sequence[Rejection]) -> None:
    """Write the rejections of a command, or remove those of an earlier one if there are none."""
    if rejections:
        write_rejections(file, rejections)
    else:
        file.unlink(missing_ok=True)


def _check_output_file(out: Path, journal_file: Path, *, overwrite: bool, resume: bool) -> None:
    """Check that the output file and the journal of a stopped command may be replaced or continued.

    Raises:
        UserError: they exist, and neither flag is given; or `out` is a folder.
    """
    if out.is_dir():
        raise UserError(f"{out}: expected a file for the output, got a folder. Choose another --out.")
    if out.exists() and not overwrite and not (resume and journal_file.is_file()):
        raise UserError(f"{out}: expected a new file. Use --overwrite to replace it, or choose another --out.")
    if journal_file.is_file() and not resume:
        if not overwrite:
            raise UserError(
                f"{out}: an earlier command was stopped. Use --resume to continue it, or --overwrite to start over."
            )
        with acquire_lock(journal_file, wait=False) as file:
            file.truncate(0)


def _write_answers(
    answers: Iterable[tuple[ImageRecord, Answer | Rejection]],
    index: Index,
    folder: Path,
    journal: ProgressJournal,
    write_answer: AnswerWriter,
) -> tuple[list[PredictionRow], list[Rejection]]:
    """Write the files of each answer; return the rows of `predictions.csv` and all rejections."""
    names = _make_file_names(index.records)
    for record, answer in answers:
        if isinstance(answer, Rejection):
            journal.add(record.image, _encode_rejection(answer))
            continue
        try:
            row = write_answer(folder / names[record.image], index, answer)
            journal.add(record.image, {"row": {**row, **answer.ood_result.columns}})
        except ReadError as error:
            journal.add(record.image, _encode_rejection(Rejection(record.path, error.reason, error.detail)))
    entries = [journal.entries[record.image] for record in index.records]
    return [entry["row"] for entry in entries if "row" in entry], [*index.rejected, *_decode_rejections(entries)]


def _collect_features(
    answers: Iterable[tuple[ImageRecord, Answer | Rejection]],
    index: Index,
    network: Predictor,
    journal: ProgressJournal,
    maps: Path | None,
) -> tuple[list[FeatureRow], list[Rejection]]:
    """Collect the features of all images and write their mutual-information maps; return rows and all rejections."""
    names = _make_file_names(index.records)
    for record, answer in answers:
        if isinstance(answer, Rejection):
            journal.add(record.image, _encode_rejection(answer))
            continue
        entry: Entry = {"features": encode_features(answer.prediction, answer.ood_result)}
        if maps is not None:
            path, scores = write_map(
                maps / names[record.image], network.predict_score_map(answer.volume), answer.volume
            )
            entry["map"] = {"image": record.image, "file": path.name, **scores}
        journal.add(record.image, entry)
    entries = [journal.entries[record.image] for record in index.records]
    map_rows = [entry["map"] for entry in entries if "map" in entry]
    if maps is not None and map_rows:
        write_csv(maps / "maps.csv", list(map_rows[0]), (list(row.values()) for row in map_rows))
    rows = [
        FeatureRow(record.image, record.subject, *decode_features(entry["features"]))
        for record, entry in zip(index.records, entries, strict=True)
        if "features" in entry
    ]
    return rows, [*index.rejected, *_decode_rejections(entries)]


def _encode_rejection(rejection: Rejection) -> Entry:
    return {"rejected": [rejection.path, rejection.reason, rejection.detail]}


def _decode_rejections(entries: Iterable[Entry]) -> list[Rejection]:
    return [Rejection(*entry["rejected"]) for entry in entries if "rejected" in entry]


def _get_predictor(package: Package | Predictor) -> Predictor:
    return package.network if isinstance(package, Package) else package


def _describe_package(package: Package | Predictor) -> dict[str, str] | None:
    """Describe the package by name, version and digest; None for a run under torch."""
    if not isinstance(package, Package):
        return None
    return {"name": package.contract.name, "version": package.contract.version, "sha256": package.sha256}


def _identify_inputs(package: Package | Predictor, index: Index) -> dict[str, str]:
    """Digests of the network and the images, which must be the same to continue."""
    return {"network_sha256": package.sha256, "index_hash": index.hash}


def _list_input_paths(inputs: PredictInputs) -> list[Path]:
    if isinstance(inputs, Index):
        return [inputs.root]
    if isinstance(inputs, ImageSource):
        return list(inputs.paths)
    return [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]


def _open_index(inputs: PredictInputs, modality: Modality) -> Index:
    if isinstance(inputs, Index):
        index = inputs
    else:
        source = inputs if isinstance(inputs, ImageSource) else ImageSource(_list_input_paths(inputs))
        index = _open_source(source, modality)
    if index.modality != modality:
        raise UserError(
            f"expected images of modality {modality}, got an index of {index.modality}. Use another package."
        )
    return index


def _open_source(source: ImageSource, modality: Modality) -> Index:
    if len(source.paths) != 1 or not is_index(source.paths[0]):
        return build_index(source.paths, modality, keep_names=source.keep_names)
    if source.keep_names:
        raise UserError("--keep-names has no effect on an existing index. Give --keep-names to `medim index`.")
    return Index.read(source.paths[0])


def _iterate_answers(
    package: Package | Predictor,
    index: Index,
    journal: ProgressJournal,
    *,
    progress: AnswerProgress | None,
    limits: DecodingLimits,
) -> Iterator[tuple[ImageRecord, Answer | Rejection]]:
    """Predict each image that the journal lacks; yield the prediction, or the reason why there is none."""
    network = _get_predictor(package)
    for number, record in enumerate(index.records, start=1):
        if record.image in journal.entries:
            continue
        try:
            _check_completeness(record)
            limits.check_image(index.locate(record).stat().st_size, math.prod(record.shape))
            check_memory(math.prod(record.shape) * BYTES_PER_VOXEL)
            if (plan := index.plan_slices(record)) is not None:
                limits.check_plan(plan)
                if isinstance(package, Package):
                    package.contract.dicom_in.check_plan(plan)
            volume = index.open(record)
            prediction, ood_result = network.predict_with_ood(volume)
        except UserError as error:
            reason, detail = getattr(error, "reason", "not-for-this-network"), getattr(error, "detail", str(error))
            yield record, Rejection(record.path, reason, detail)
        except OSError as error:
            yield record, Rejection(record.path, "unreadable", f"the file cannot be opened ({error.strerror})")
        except MemoryError:
            yield record, Rejection(record.path, "too-much-memory", "the image does not fit into memory")
        else:
            yield record, Answer(record=record, volume=volume, prediction=prediction, ood_result=ood_result)
        if progress is not None:
            progress(number, len(index.records))


def _check_completeness(record: ImageRecord) -> None:
    """Reject a series that may lack a slice at one end, which its geometry cannot show.

    Raises:
        ReadError: an unreadable file lies in the folder of the series.
    """
    if "damaged-neighbour" in (record.quality or "").split():
        raise ReadError(
            "incomplete-series",
            "an unreadable file in the folder of the series may be one of its slices. Repair or remove that file",
        )


def _select_writer(package: Package | Predictor, output_format: str, *, labelmap: bool) -> AnswerWriter:
    """Select the function that writes predictions in a format.

    Raises:
        UsageError: the format is unknown or has no option `labelmap`.
        UserError: the package does not support the format.
    """
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


def _write_answer(package: Package | Predictor, stem: Path, index: Index, answer: Answer) -> PredictionRow:
    """Write a prediction as NIfTI, PNG or JSON; return its row of `predictions.csv`."""
    network, image = _get_predictor(package), answer.record.image
    columns = network.task.answer_columns(answer.prediction, answer.volume, network.classes)
    if network.task.dense:
        path = write_mask(stem, answer.prediction, answer.volume)
        return {"image": image, "file": path.name, **columns}
    path = stem.with_name(f"{stem.name}.json")
    content = {"schema_version": SCHEMA_VERSION, "image": image}
    content |= network.task.answer_content(columns, network.classes)
    write_json(path, {**content, **answer.ood_result.columns, "package": _describe_package(package)})
    return {"image": image, "file": path.name, **columns}


def _make_file_names(records: Sequence[ImageRecord]) -> dict[str, str]:
    """Make a file name for each image key: at most 100 ASCII characters, unique on case-insensitive file systems."""
    names = {record.image: re.sub(r"[^A-Za-z0-9._-]+", "_", record.image).strip("._")[:100] for record in records}
    name_counts: dict[str, int] = {}
    for name in names.values():
        name_counts[name.lower()] = name_counts.get(name.lower(), 0) + 1
    reserved = {"", "summary", "predictions", "rejected", "progress"}
    for key, name in names.items():
        if name_counts[name.lower()] > 1 or name.lower() in reserved:
            names[key] = f"{name or 'image'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return names


def _build_rejection_error(index: Index, rejections: Sequence[Rejection]) -> AllRejectedError:
    first_rejection = f"{rejections[0].path}: {rejections[0].detail}" if rejections else "the source contains no image"
    message = f"all {len(rejections)} inputs were rejected by this package. First: {first_rejection}."
    return AllRejectedError(message, replace(index, records=(), rejected=tuple(rejections)))
