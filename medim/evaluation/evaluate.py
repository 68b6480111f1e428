"""Measure a trained network on labelled images by the code that the hospital runs.

`validate_network` measures a network in memory; `evaluate` is the command: it opens a run or a package, chooses the
images, and writes `metrics.json`, `cases.parquet` and `summary.json`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from medim.data.contamination import ContaminationFilter, load_training_history
from medim.data.index.index import ImageRecord, Index
from medim.data.loading.splits import assign_splits as split_subjects
from medim.data.loading.splits import read_splits
from medim.evaluation.cases import SCHEMA_VERSION, CaseProgress, score_cases, summarise_cases, write_cases
from medim.files import prepare_output_folder, write_json
from medim.inference.network import Predictor
from medim.metrics.bootstrap import N_RESAMPLES
from medim.model_spec import ModelSpec
from medim.models.model import as_numpy_function
from medim.models.serialization import load_encoder, load_model
from medim.objectives.score_map import load_score_map
from medim.package.package import load_package
from medim.tasks import ENCODER, find_task_of_kind
from medim.tasks.task import CaseRow
from medim.types import PredictFn, Split, UserError

log = logging.getLogger(__name__)
SplitChoice = Split | Literal["all"]


def validate_network(
    run: PredictFn,
    index: Index,
    records: Sequence[ImageRecord],
    spec: ModelSpec,
    *,
    seed: int = 0,
    progress: CaseProgress | None = None,
) -> tuple[dict[str, Any], list[CaseRow]]:
    """Measure a network in memory on labelled images.

    Args:
        run: the network.
        index: where the images come from.
        records: those to measure on; each has a mask (segmenter) or a label (classifier).
        spec: the model's spec (see `medim.models.serialization`).
        seed: of the bootstrap.
        progress: called after each case.

    Returns:
        `n` images measured, their `subjects`, images `rejected`, and `metrics` (each value, ci_low, ci_high, n); and
        the rows of `cases.parquet`.

    Raises:
        UserError: no image could be measured, or the classes of images and network are not the same.
    """
    network = build_predictor(run, spec)
    rows = score_cases(network, index, records, progress=progress)
    return summarise_cases(rows, network.kind, network.classes, seed=seed), rows


def evaluate(
    model: Path,
    index: Index,
    out: Path,
    *,
    split: SplitChoice | None = None,
    include_seen: bool = False,
    strict: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: CaseProgress | None = None,
) -> dict[str, Any]:
    """Measure a run or a package on the labelled images of an index.

    Images that the model was trained on, and all images of subjects it was trained on, are left out and counted; what
    was seen in pretraining alone stays in, and is counted.

    Args:
        model: a fine-tuning run (run by torch) or a package (run by ONNX Runtime).
        index: the images.
        out: folder for `metrics.json`, `cases.parquet` and, last, `summary.json`.
        split: which images; see `select_records`.
        include_seen: keep images and subjects that the model was trained on.
        strict: refuse where an image or subject was seen, in pretraining or in fine-tuning.
        seed: of the bootstrap.
        overwrite: empty `out` first.
        progress: called after each case.

    Returns:
        The content of `summary.json`, which holds all of `metrics.json`.

    Raises:
        UserError: no usable model or image, a non-empty `out`, or `strict`.
    """
    start = time.perf_counter()
    network, spec = open_network(model)
    records, split_name = select_records(index, spec, split=split, split_file=_find_split_file(model))
    prepare_output_folder(out, overwrite=overwrite)
    log.info("measuring on %d images (%s)", len(records), split_name)
    contamination_filter = ContaminationFilter(load_training_history(model), include_seen=include_seen, strict=strict)
    rows = score_cases(network, index, records, case_filter=contamination_filter, progress=progress)
    contamination, exclusion_counts = contamination_filter.result(f"model {model}", len(rows))
    content = {
        "schema_version": SCHEMA_VERSION,
        "command": "evaluate",
        "task": network.task.title,
        "split": split_name,
        "seen": contamination,
        **exclusion_counts,
        **summarise_cases(rows, network.kind, network.classes, seed=seed),
        "classes": list(network.classes),
        "init": "pretrained" if spec.provenance.parent else "scratch",
        "model_sha256": spec.sha256,
        "index_hash": index.hash,
        "bootstrap": {"over": "subjects", "resamples": N_RESAMPLES, "seed": seed, "level": 0.95},
    }
    write_json(out / "metrics.json", content)
    write_cases(out / "cases.parquet", rows, network.kind)
    seconds = time.perf_counter() - start
    summary = {
        **content,
        "rejected_by_reason": dict(sorted(Counter(row["rejected"] for row in rows if row.get("rejected")).items())),
        "runtime": "onnxruntime" if _is_package(model) else "torch",
        "seconds": seconds,
        "seconds_per_image": seconds / len(records),
    }
    write_json(out / "summary.json", summary)
    return summary


def select_records(
    index: Index, spec: ModelSpec, *, split: SplitChoice | None = None, split_file: Path | None = None
) -> tuple[tuple[ImageRecord, ...], SplitChoice]:
    """Choose the labelled images to evaluate on.

    Without `split`: `test` where the source has a labelled one; the validation split where the source is the one the
    model was fine-tuned on; else all.

    Args:
        index: the images.
        spec: the model's spec.
        split: overrides the rule.
        split_file: `split.csv` of the run; where the source is its own, its split is taken from there.

    Returns:
        The images, and the split they are of.

    Raises:
        UserError: there is none.
    """
    target_field = find_task_of_kind(spec.kind).target_field
    labelled = [record for record in index.records if getattr(record, target_field) is not None]
    if not labelled:
        count = len(index.records)
        raise UserError(
            f"{index.root}: expected images with a {target_field}, got {count} images without. Give --labels CSV."
        )
    same_index = spec.provenance.index_hash == index.hash
    splits = (
        read_splits(split_file)
        if same_index and split_file
        else split_subjects(index, seed=spec.provenance.split_seed or 0)
    )
    if split is None:
        split = "test" if any(record.split == "test" for record in labelled) else "val" if same_index else "all"
    selection = tuple(record for record in labelled if split == "all" or splits.get(record.image) == split)
    if not selection:
        raise UserError(
            f"{index.root}: expected labelled images to evaluate in split {split!r}, got none: choose another --split."
        )
    return selection, split


def open_network(path: Path) -> tuple[Predictor, ModelSpec]:
    """A fine-tuned network and its spec: of a package by ONNX Runtime, of a run by torch.

    Raises:
        UserError: neither lies at `path`, or it is damaged, or there is an encoder alone.
    """
    if not _is_package(path):
        model, spec = load_model(path)
        return build_predictor(as_numpy_function(model.to("cuda" if torch.cuda.is_available() else "cpu")), spec), spec
    package = load_package(path)
    if package.contract.kind == ENCODER:
        raise UserError(f"{path}: expected a package that predicts, got an encoder's. Export a fine-tuned run instead.")
    return package.network, package.contract.spec


def open_encoder(path: Path) -> Predictor:
    """An encoder of a run, to be run by torch; what it answers is its summary, and its map where it has a critic."""
    encoder: Any = load_encoder(path)
    network, score_map = (
        build_predictor(as_numpy_function(encoder), replace(encoder.spec, kind=ENCODER)),
        load_score_map(path),
    )
    return network if score_map is None else replace(network, score_map=as_numpy_function(score_map))


def build_predictor(run: PredictFn, spec: ModelSpec) -> Predictor:
    """A network with what its spec says of feeding it."""
    return Predictor(
        run=run,
        kind=spec.kind,
        modality=spec.modality,
        spatial_dims=spec.spatial_dims,
        in_channels=spec.in_channels,
        classes=spec.classes,
        preprocessing=spec.preprocessing,
        inference=spec.inference,
    )


def _find_split_file(model: Path) -> Path | None:
    """`split.csv` of a run, given by its folder or its `model/`."""
    candidates = [] if _is_package(model) else [model / "split.csv", model.parent / "split.csv"]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _is_package(path: Path) -> bool:
    return (path / "medim.json").is_file()
