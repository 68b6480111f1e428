"""Evaluate a trained network on labelled images, with the inference code of the exported package.

`validate_network` evaluates a network in memory. `evaluate` is the command: it opens a run or a package, selects the
images, and writes `metrics.json`, `cases.parquet` and `summary.json`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from medim.data.contamination import ContaminationFilter, load_training_history
from medim.data.index.index import ImageRecord, Index
from medim.data.index.records import write_rejections
from medim.data.loading.splits import assign_splits as split_subjects
from medim.data.loading.splits import read_splits
from medim.evaluation.case_pictures import PICTURES_FILE, write_case_pictures
from medim.evaluation.cases import CaseProgress, CaseSummary, score_cases, summarise_cases, write_cases
from medim.files import write_json
from medim.inference.network import Predictor
from medim.metrics.bootstrap import N_RESAMPLES
from medim.model_spec import ModelSpec
from medim.models.device import choose_device
from medim.models.model import as_numpy_function
from medim.models.serialization import load_encoder, load_model
from medim.objectives.score_map import load_score_map
from medim.output_folder import REJECTIONS_FILE, output_folder
from medim.package.package import load_package
from medim.tasks import ENCODER, find_task_of_kind
from medim.tasks.task import CaseRow
from medim.types import PredictFn, Split, UserError

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2  # of metrics.json and summary.json
SplitChoice = Split | Literal["all"]


def validate_network(
    run: PredictFn,
    index: Index,
    records: Sequence[ImageRecord],
    spec: ModelSpec,
    *,
    seed: int = 0,
    progress: CaseProgress | None = None,
) -> tuple[CaseSummary, list[CaseRow]]:
    """Evaluate a network in memory on labelled images.

    Args:
        run: the network.
        index: index of the images.
        records: images to evaluate; each has a mask (segmenter) or a label (classifier).
        spec: specification of the model (see `medim.models.serialization`).
        seed: random seed of the bootstrap.
        progress: called after each case.

    Returns:
        `n` (evaluated images), `subjects`, `rejected` (images) and `metrics` (each with value, ci_low, ci_high, n); and
        the rows of `cases.parquet`.

    Raises:
        UserError: no image could be evaluated, or the classes of images and network differ.
    """
    network = build_predictor(run, spec)
    rows = score_cases(network, index, records, progress=progress)
    return summarise_cases(rows, network.kind, network.classes, seed=seed), rows


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Images to evaluate, the treatment of training images, and the handling of the output folder.

    Attributes:
        split: split to evaluate; None: chosen by `select_records`.
        include_training_subjects: keep images and subjects that the model was trained on.
        fail_on_contamination: raise an error if an image or subject was used in pretraining or fine-tuning.
        seed: random seed of the bootstrap.
        overwrite: empty the output folder first.
        device: auto, cpu, cuda or mps, for a run; a package runs on the CPU.
    """

    split: SplitChoice | None = None
    include_training_subjects: bool = False
    fail_on_contamination: bool = False
    seed: int = 0
    overwrite: bool = False
    device: str = "auto"


def evaluate(
    model: Path,
    index: Index,
    out: Path,
    options: EvaluateOptions | None = None,
    *,
    progress: CaseProgress | None = None,
) -> dict[str, Any]:
    """Evaluate a run or a package on the labelled images of an index.

    Images that the model was trained on, and all images of subjects it was trained on, are excluded and counted. Images
    used in pretraining only are not excluded, but counted.

    Args:
        model: a fine-tuning run (run by torch) or a package (run by ONNX Runtime).
        index: the images.
        out: folder for `metrics.json`, `cases.parquet`, `pictures.json` (patient images) and, last, `summary.json`.
        options: options of the evaluation.
        progress: called after each case.

    Returns:
        The content of `summary.json`, which includes that of `metrics.json`.

    Raises:
        UserError: there is no usable model or image, `out` is not empty, or `fail_on_contamination` is set and there is
            contamination.
    """
    options = options or EvaluateOptions()
    start = time.perf_counter()
    network, spec = open_network(model, options.device)
    records, split = select_records(index, spec, split=options.split, split_file=_find_split_file(model))
    with output_folder(out, "evaluate", overwrite=options.overwrite, inputs=[model, index.root]) as folder:
        log.info("evaluating %d images (%s)", len(records), split)
        case_filter = ContaminationFilter(
            load_training_history(model),
            include_training_subjects=options.include_training_subjects,
            fail_on_contamination=options.fail_on_contamination,
        )
        rows = score_cases(network, index, records, case_filter=case_filter, progress=progress)
        contamination, exclusion_counts = case_filter.result(f"model {model}", len(rows))
        content = {
            "schema_version": SCHEMA_VERSION,
            "command": "evaluate",
            "task": network.task.title,
            "split": split,
            "contamination": contamination,
            **exclusion_counts,
            **summarise_cases(rows, network.kind, network.classes, seed=options.seed),
            **_describe_inputs(network, spec, index),
            "bootstrap": {"unit": "subject", "resamples": N_RESAMPLES, "seed": options.seed, "level": 0.95},
        }
        write_rejections(folder / REJECTIONS_FILE, index.rejected)
        write_json(folder / "metrics.json", content)
        write_cases(folder / "cases.parquet", rows, network.kind)
        write_case_pictures(folder / PICTURES_FILE, index, records, rows, network)
        summary = {**content, **_describe_execution(model, rows, time.perf_counter() - start, len(records))}
        write_json(folder / "summary.json", summary)
    return summary


def _describe_inputs(network: Predictor, spec: ModelSpec, index: Index) -> dict[str, object]:
    return {
        "classes": list(network.classes),
        "init": "pretrained" if spec.provenance.parent else "scratch",
        "n_selection_labels": spec.n_selection_labels,
        "model_sha256": spec.sha256,
        "index_hash": index.hash,
    }


def _describe_execution(model: Path, rows: Sequence[CaseRow], seconds: float, n_images: int) -> dict[str, object]:
    return {
        "rejected_by_reason": dict(sorted(Counter(row["rejected"] for row in rows if row.get("rejected")).items())),
        "runtime": "onnxruntime" if _is_package(model) else "torch",
        "seconds": seconds,
        "seconds_per_image": seconds / n_images,
    }


def select_records(
    index: Index, spec: ModelSpec, *, split: SplitChoice | None = None, split_file: Path | None = None
) -> tuple[tuple[ImageRecord, ...], SplitChoice]:
    """Select the labelled images to evaluate.

    Without `split`: `test` if the source has a labelled test split; the validation split if the model was fine-tuned on
    this source; otherwise all images.

    Args:
        index: the images.
        spec: specification of the model.
        split: split that overrides this rule.
        split_file: `split.csv` of the run; used if the model was fine-tuned on this source.

    Returns:
        The images, and the name of their split.

    Raises:
        UserError: there are no labelled images, or none in the split.
    """
    target_field = find_task_of_kind(spec.kind).target_field
    labelled = [record for record in index.records if getattr(record, target_field) is not None]
    if not labelled:
        raise UserError(find_task_of_kind(spec.kind).describe_missing_targets(index))
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
            f"{index.source_name}: there are no labelled images in split {split!r}. Choose another --split."
        )
    return selection, split


def open_network(path: Path, device: str = "auto") -> tuple[Predictor, ModelSpec]:
    """Open a fine-tuned network and its spec: a package with ONNX Runtime, a run with torch.

    Args:
        path: run or package.
        device: auto, cpu, cuda or mps, for a run.

    Raises:
        UserError: the device is not available, there is no run or package at `path`, it is damaged, or it contains
            only an encoder.
    """
    if not _is_package(path):
        torch_device = choose_device(device)
        model, spec = load_model(path)
        return build_predictor(as_numpy_function(model.to(torch_device)), spec), spec
    package = load_package(path)
    if package.contract.kind == ENCODER:
        raise UserError(
            f"{path}: this package contains an encoder, which cannot be evaluated. Export a fine-tuned run instead."
        )
    return package.network, package.contract.spec


def open_encoder(path: Path) -> Predictor:
    """Open the encoder of a run with torch; its output is the summary, and the score map if the run has a critic."""
    encoder: Any = load_encoder(path)
    network, score_map = (
        build_predictor(as_numpy_function(encoder), replace(encoder.spec, kind=ENCODER)),
        load_score_map(path),
    )
    return network if score_map is None else replace(network, score_map=as_numpy_function(score_map))


def build_predictor(run: PredictFn, spec: ModelSpec) -> Predictor:
    """Combine a network with the preprocessing, inference and classes of its spec."""
    return Predictor(
        run=run,
        kind=spec.kind,
        modality=spec.modality,
        spatial_dims=spec.spatial_dims,
        in_channels=spec.in_channels,
        classes=spec.classes,
        class_values=spec.class_values,
        preprocessing=spec.preprocessing,
        inference=spec.inference,
        sha256=spec.sha256,
    )


def _find_split_file(model: Path) -> Path | None:
    """Locate `split.csv` of a run, given by its folder or its `model/` folder."""
    candidates = [] if _is_package(model) else [model / "split.csv", model.parent / "split.csv"]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _is_package(path: Path) -> bool:
    return (path / "medim.json").is_file()
