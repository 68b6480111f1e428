"""Images of `medim predict` and `medim embed`: open the source, and predict the images that are not finished."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from medim.data.index.index import AllRejectedError, ImageRecord, Index, Rejection, build_index, is_index
from medim.data.readers import ReadError
from medim.data.readers.base import check_memory
from medim.data.readers.sandbox import DecodingLimits
from medim.inference.network import Predictor
from medim.output_folder import output_folder
from medim.package.package import Package
from medim.predict.answer import Answer
from medim.predict.progress import ProgressJournal
from medim.types import Modality, UserError


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


def open_answer_folder(
    out: Path, command: str, inputs: PredictInputs, *, overwrite: bool, resume: bool
) -> AbstractContextManager[Path]:
    """Lock a folder of answers that a stopped command can continue, see `output_folder`."""
    paths = list_input_paths(inputs)
    return output_folder(out, command, overwrite=overwrite, resume=resume, inputs=paths, resumable=True)


def get_predictor(package: Package | Predictor) -> Predictor:
    """Return the network of a package."""
    return package.network if isinstance(package, Package) else package


def identify_inputs(package: Package | Predictor, index: Index) -> dict[str, str]:
    """Return the digests of network and images, which must be equal to continue a stopped command."""
    return {"network_sha256": package.sha256, "index_hash": index.hash}


def list_input_paths(inputs: PredictInputs) -> list[Path]:
    """List the files and folders to read; of an index, the folder of its images."""
    if isinstance(inputs, Index):
        return [inputs.root]
    if isinstance(inputs, ImageSource):
        return list(inputs.paths)
    return [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]


def open_index(inputs: PredictInputs, modality: Modality) -> Index:
    """Open or build the index of the inputs.

    Raises:
        AllRejectedError: no input is an image of the modality.
        UserError: the index is of another modality, or an input does not exist.
    """
    if isinstance(inputs, Index):
        index = inputs
    else:
        source = inputs if isinstance(inputs, ImageSource) else ImageSource(list_input_paths(inputs))
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


def iterate_answers(
    package: Package | Predictor,
    index: Index,
    journal: ProgressJournal,
    *,
    progress: AnswerProgress | None,
    limits: DecodingLimits,
) -> Iterator[tuple[ImageRecord, Answer | Rejection]]:
    """Predict each image that the journal lacks; yield the prediction, or the reason why there is none."""
    network = get_predictor(package)
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


def make_file_names(records: Sequence[ImageRecord]) -> dict[str, str]:
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


def build_rejection_error(index: Index, rejections: Sequence[Rejection]) -> AllRejectedError:
    """Build the error for a source of which no image was processed."""
    first_rejection = f"{rejections[0].path}: {rejections[0].detail}" if rejections else "the source contains no image"
    message = f"all {len(rejections)} inputs were rejected by this package. First: {first_rejection}."
    return AllRejectedError(message, replace(index, records=(), rejected=tuple(rejections)))
