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

from medim.data.index.index import AllRejectedError, Index, Record, Rejection, build_index, is_index
from medim.data.index.records import write_rejections
from medim.data.readers import ReadError
from medim.data.readers.dicom.sandbox import Limits, decoding_apart
from medim.files import fresh_folder, write_bytes, write_csv, write_json
from medim.inference.network import Network
from medim.inference.ood import Verdict
from medim.package.package import Package
from medim.predict.embeddings import WRITERS
from medim.predict.outputs import classified, sizes, write_map, write_mask
from medim.types import Array, Modality, UsageError, UserError, Volume

SCHEMA_VERSION = 1
Format = Literal["nifti", "dicom"]
Writer = Callable[[Path, Index, Record, Volume, Array, Verdict], dict[str, Any]]  # file without suffix, ...: its row
Inputs = Index | Path | Sequence[Path]
Progress = Callable[[int, int], None]  # images done, images in all
LIMITS = Limits()


def predict(
    package: Package | Network,
    inputs: Inputs,
    out: Path,
    *,
    as_: Format = "nifti",
    labelmap: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    limits: Limits = LIMITS,
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
    network = _network(package)
    if network.kind == "encoder":
        raise UserError("predict: expected a segmenter or classifier, got an encoder. Use `medim embed`.")
    write = _writer(package, as_, labelmap=labelmap)
    folder = fresh_folder(out, overwrite=overwrite)
    rows = []
    with decoding_apart(limits):
        index = _index(inputs, network.modality, folder / "rejected.csv")
        names = _file_names(index.records)
        rejected: list[Rejection] = [*index.rejected]
        for record, volume, answer, verdict in _answers(package, index, rejected, progress, limits):
            try:
                row = write(folder / names[record.image], index, record, volume, answer, verdict)
                rows.append({**row, **verdict.columns})
            except ReadError as error:
                rejected.append(Rejection(record.path, error.reason, error.detail))
    write_rejections(folder / "rejected.csv", rejected)
    if not rows:
        raise _all_rejected(index, rejected)
    write_csv(folder / "predictions.csv", list(rows[0]), (list(row.values()) for row in rows))
    counts = {"images": len(index.records), "predicted": len(rows), "rejected": len(rejected)}
    write_json(
        folder / "summary.json", {"schema_version": SCHEMA_VERSION, "package": _identity(package), "counts": counts}
    )
    return rows


def embed_images(
    package: Package | Network,
    inputs: Inputs,
    out: Path,
    *,
    maps: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    limits: Limits = LIMITS,
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
    network = _network(package)
    if network.kind != "encoder":
        raise UserError(f"embed: expected an encoder, got a {network.kind}. Export the pretraining run, and use that.")
    writer = WRITERS.get(out.suffix)
    if writer is None:
        raise UsageError(f"--out {out}: expected a file ending in {', '.join(WRITERS)}.")
    if maps is not None:
        network.check_score_map()
        fresh_folder(maps, overwrite=overwrite)
    reasons = out.with_name(f"{out.name}.rejected.csv")
    found, verdicts, rows = [], [], []
    with decoding_apart(limits):
        index = _index(inputs, network.modality, reasons)
        rejected: list[Rejection] = [*index.rejected]
        names = _file_names(index.records)
        for record, volume, answer, verdict in _answers(package, index, rejected, progress, limits):
            found.append((record, answer))
            verdicts.append(verdict)
            if maps is not None:
                path, scores = write_map(maps / names[record.image], network.scores(volume), volume)
                rows.append({"image": record.image, "file": path.name, **scores})
    if rejected:
        write_rejections(reasons, rejected)
    if not found:
        raise _all_rejected(index, rejected)
    features = np.stack([answer for _, answer in found]).astype(np.float32)
    images = tuple(record.image for record, _ in found)
    write_bytes(out, writer(images, tuple(record.subject for record, _ in found), features, verdicts))
    if maps is not None:
        write_csv(maps / "maps.csv", list(rows[0]), (list(row.values()) for row in rows))
    return images, features


def _network(package: Package | Network) -> Network:
    return package.network if isinstance(package, Package) else package


def _identity(package: Package | Network) -> dict[str, str] | None:
    """Which package gave an answer; None for a run under torch."""
    if not isinstance(package, Package):
        return None
    return {"name": package.contract.name, "version": package.contract.version, "sha256": package.sha256}


def _index(inputs: Inputs, modality: Modality, rejected: Path) -> Index:
    if isinstance(inputs, Index):
        index = inputs
    else:
        places = [Path(place) for place in ([inputs] if isinstance(inputs, str | Path) else inputs)]
        try:
            one_index = len(places) == 1 and is_index(places[0])
            index = Index.read(places[0]) if one_index else build_index(places, modality)
        except AllRejectedError as error:
            write_rejections(rejected, error.index.rejected)
            raise
    if index.modality != modality:
        raise UserError(
            f"expected images of modality {modality}, got an index of {index.modality}. Use another package."
        )
    return index


def _answers(
    package: Package | Network, index: Index, rejected: list[Rejection], progress: Progress | None, limits: Limits
) -> Iterator[tuple[Record, Volume, Array, Verdict]]:
    """Each image that can be answered, with its answer and how usual it is; the others join `rejected`."""
    network = _network(package)
    for done, record in enumerate(index.records, start=1):
        try:
            if (plan := index.plan(record)) is not None:
                limits.check(plan)
                if isinstance(package, Package):
                    package.contract.dicom_in.check(plan)
            volume = index.open(record)
            answer, verdict = network.guarded(volume)
        except UserError as error:
            reason, detail = getattr(error, "reason", "not-for-this-network"), getattr(error, "detail", str(error))
            rejected.append(Rejection(record.path, reason, detail))
        except MemoryError:
            rejected.append(Rejection(record.path, "too-much-memory", "the image does not fit into memory"))
        else:
            yield record, volume, answer, verdict
        if progress is not None:
            progress(done, len(index.records))


def _writer(package: Package | Network, as_: str, *, labelmap: bool) -> Writer:
    """What writes an answer.

    Raises:
        UsageError: a format that does not exist, or an option that it does not have.
        UserError: the package cannot answer in that format.
    """
    if as_ not in get_args(Format):
        raise UsageError(f"--as {as_}: expected {' or '.join(get_args(Format))}.")
    if as_ == "dicom":
        if not isinstance(package, Package):
            raise UserError("--as dicom: expected a package, got a run. Run `medim export` first.")
        from medim.predict.dicom.writer import writer  # highdicom takes a second to import

        as_dicom: Writer = writer(package, labelmap=labelmap)
        return as_dicom
    if labelmap:
        raise UsageError("--labelmap: it is a kind of DICOM segmentation. Add --as dicom, or leave it out.")
    return partial(_write, package)


def _write(
    package: Package | Network,
    stem: Path,
    index: Index,
    record: Record,
    volume: Volume,
    answer: Array,
    verdict: Verdict,
) -> dict[str, Any]:
    """Write an answer as NIfTI, PNG or JSON; its row of `predictions.csv`."""
    network = _network(package)
    if network.kind == "segmenter":
        path = write_mask(stem, answer, volume)
        return {"image": record.image, "file": path.name, **sizes(answer, volume, network.classes)}
    row = classified(network, answer)
    path = stem.with_name(f"{stem.name}.json")
    chosen = {"class": row["class"]} if "class" in row else {}
    probabilities = {label: row[f"probability_{label}"] for label in network.classes}
    content = {"schema_version": SCHEMA_VERSION, "image": record.image, **chosen, "probabilities": probabilities}
    write_json(path, {**content, **verdict.columns, "package": _identity(package)})
    return {"image": record.image, "file": path.name, **row}


def _file_names(records: Sequence[Record]) -> dict[str, str]:
    """A file name for each image key: plain characters, at most 100, no two alike even where case does not count."""
    names = {record.image: re.sub(r"[^A-Za-z0-9._-]+", "_", record.image).strip("._")[:100] for record in records}
    taken: dict[str, int] = {}
    for name in names.values():
        taken[name.lower()] = taken.get(name.lower(), 0) + 1
    reserved = {"", "summary", "predictions", "rejected"}
    for key, name in names.items():
        if taken[name.lower()] > 1 or name.lower() in reserved:
            names[key] = f"{name or 'image'}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return names


def _all_rejected(index: Index, rejected: Sequence[Rejection]) -> AllRejectedError:
    first = f"{rejected[0].path}: {rejected[0].detail}" if rejected else "the source holds no image"
    message = f"expected an image that this package can read, got none out of {len(rejected)}. First: {first}"
    return AllRejectedError(message, replace(index, records=(), rejected=tuple(rejected)))
