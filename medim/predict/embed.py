"""Command `medim embed`; it runs in the light install."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from medim.data.index.index import AllRejectedError, ImageRecord, Index, Rejection
from medim.data.index.records import write_rejections
from medim.data.readers.sandbox import DecodingLimits, sandboxed_decoding
from medim.files import write_bytes, write_csv
from medim.inference.network import Predictor
from medim.package.package import Package
from medim.predict.answer import Answer
from medim.predict.embeddings import WRITERS, FeatureRow, decode_features, encode_features, stack_features
from medim.predict.images import (
    DEFAULT_LIMITS,
    AnswerIterator,
    AnswerProgress,
    PredictInputs,
    build_rejection_error,
    get_predictor,
    identify_inputs,
    iterate_answers,
    list_input_paths,
    make_file_names,
    open_answer_folder,
    open_index,
)
from medim.predict.outputs import write_map
from medim.predict.progress import (
    JOURNAL,
    Entry,
    ProgressJournal,
    decode_rejections,
    empty_journal,
    encode_rejection,
    open_journal,
)
from medim.tasks import ENCODER
from medim.types import Array, UsageError, UserError


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
    network = get_predictor(package)
    encode_rows = _select_encoding(network, out)
    rejections_file, journal_file = out.with_name(f"{out.name}.rejected.csv"), out.with_name(f".{out.name}.{JOURNAL}")
    _check_output_file(out, journal_file, inputs, overwrite=overwrite, resume=resume)
    if maps is not None:
        network.require_score_map()
    map_folders = (
        nullcontext() if maps is None else open_answer_folder(maps, "embed", inputs, overwrite=overwrite, resume=resume)
    )
    try:
        with sandboxed_decoding(limits), map_folders as map_folder:
            index = open_index(inputs, network.modality)
            iterator = partial(iterate_answers, package, index, progress=progress, limits=limits)
            rows, rejections = _extract_features(package, index, journal_file, iterator, map_folder)
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
    iterator: AnswerIterator,
    maps: Path | None,
) -> tuple[list[FeatureRow], list[Rejection]]:
    """Extract the features that the journal lacks; return rows and all rejections."""
    settings = {"maps": maps is not None, **identify_inputs(package, index)}
    with open_journal(journal_file, settings) as journal:
        rows, rejections = _collect_features(iterator(journal), index, get_predictor(package), journal, maps)
    if not rows:
        raise build_rejection_error(index, rejections)
    return rows, rejections


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


def _check_output_file(out: Path, journal_file: Path, inputs: PredictInputs, *, overwrite: bool, resume: bool) -> None:
    """Check that the output file and the journal of a stopped command may be replaced or continued.

    The journal is emptied if the command starts over.

    Raises:
        UserError: they exist, and neither flag is given; `out` is a folder or an input; or another command writes.
    """
    if out.is_dir():
        raise UserError(f"{out}: expected a file for the output, got a folder. Choose another --out.")
    if out.resolve() in {path.resolve() for path in list_input_paths(inputs)}:
        raise UserError(f"{out}: expected another file than the images, got one of them. Choose another --out.")
    if out.exists() and not overwrite and not (resume and journal_file.is_file()):
        raise UserError(f"{out}: expected a new file. Use --overwrite to replace it, or choose another --out.")
    if journal_file.is_file() and not resume:
        if not overwrite:
            raise UserError(
                f"{out}: an earlier command was stopped. Use --resume to continue it, or --overwrite to start over."
            )
        empty_journal(journal_file)


def _collect_features(
    answers: Iterable[tuple[ImageRecord, Answer | Rejection]],
    index: Index,
    network: Predictor,
    journal: ProgressJournal,
    maps: Path | None,
) -> tuple[list[FeatureRow], list[Rejection]]:
    """Collect the features of all images and write their mutual-information maps; return rows and all rejections."""
    names = make_file_names(index.records)
    if maps is not None:
        journal.discard_missing(maps, lambda _, entry: [str(entry["map"]["file"])] if "map" in entry else [])
    for record, answer in answers:
        if isinstance(answer, Rejection):
            journal.add(record.image, encode_rejection(answer))
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
    return rows, [*index.rejected, *decode_rejections(entries)]
