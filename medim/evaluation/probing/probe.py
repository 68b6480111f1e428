"""Probe a frozen encoder: metrics of a simple classifier or regression on its features with few labels.

Features are computed once. Each label budget is drawn with several seeds. All arms (the encoder, its untrained
architecture, the pixels) use the same subsets, so that arms, encoders and probe classifiers can be paired by budget and
seed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from medim.data.contamination import ContaminationCounts, check_contamination, load_training_history
from medim.data.index.index import ImageRecord, Index
from medim.data.index.records import write_rejections
from medim.data.loading.cohort import Cohort, VolumeCache
from medim.evaluation.cases import write_parquet
from medim.evaluation.probing.baselines import build_random_encoder, principal_components
from medim.evaluation.probing.classifiers import PROBES, ProbePrediction
from medim.evaluation.probing.label_budget import Budget, draw_probe_subsets, number_subjects
from medim.evaluation.probing.probe_cohort import open_probe_cohort
from medim.files import json_sha256, write_json
from medim.metrics import build_statistics
from medim.metrics.bootstrap import N_RESAMPLES, bootstrap_intervals
from medim.model_spec import ModelSpec
from medim.models.device import choose_device
from medim.models.feature_extraction import batch_images, check_finite_features, extract_features
from medim.models.serialization import load_encoder, locate_weights
from medim.output_folder import REJECTIONS_FILE, output_folder
from medim.tasks import TASKS
from medim.tasks.task import Task
from medim.types import Array, UsageError, UserError

log = logging.getLogger(__name__)
SCHEMA_VERSION = 2
ProbeRow = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Classifier and features, label subsets, and the handling of the output folder.

    Attributes:
        protocol: an entry of `PROBES`.
        budgets: label budgets.
        seeds: random seeds of the label subsets, of the classifier, and of the weights of the untrained encoder.
        levels: levels of the feature maps to append to the summary as mean and maximum; None: all.
        split_seed: random seed of the split by subject.
        baselines: evaluate the untrained encoder (`random`) and the pixels too.
        overwrite: empty the output folder first.
        store: folder of preprocessed images; None is the user's cache.
        fail_on_contamination: raise an error if the encoder or the training split shares an image or subject with the
            validation split.
        cohort: the preprocessed images, if they are open already; `store` and the split are then not used.
        device: auto, cpu, cuda or mps.
    """

    protocol: str = "linear"
    budgets: Sequence[Budget] = (Budget(fraction=1.0),)
    seeds: Sequence[int] = (0,)
    levels: Sequence[int] | None = None
    split_seed: int = 0
    baselines: bool = True
    overwrite: bool = False
    store: Path | None = None
    fail_on_contamination: bool = False
    cohort: Cohort | None = None
    device: str = "auto"


def probe(encoder: Path, index: Index, out: Path, options: ProbeOptions | None = None) -> dict[str, Any]:
    """Evaluate a frozen encoder on the validation split, with label budgets of the training split.

    A row is one classifier: features, budget and seed. Rows of one budget and seed use the same labelled images for all
    features, classifiers and encoders (`subset` is the hash of these images). A budget of all labelled images has a
    single subset, and is evaluated with the first seed only.

    Args:
        encoder: a pretraining run or its package.
        index: the images, some of them labelled.
        out: folder for `cases.parquet` and, last, `probe.json`.
        options: options of the probe.

    Returns:
        The content of `probe.json`: `rows`, their `summary`, and a description of the images. `cases.parquet` contains
        the probabilities, or the predicted number, of each validation image.

    Raises:
        UserError: there is no encoder or no label, a budget lacks a class, `out` is not empty, or
            `fail_on_contamination` is set and there is contamination.
        UsageError: an unknown protocol or level, or a budget out of range.

    Examples:
        >>> from medim import build_index  # doctest: +SKIP
        >>> index = build_index(Path("scans"), "mri", labels=Path("labels.csv"))  # doctest: +SKIP
        >>> options = ProbeOptions(budgets=[Budget(labelled=10)])  # doctest: +SKIP
        >>> content = probe(Path("run"), index, Path("probe"), options)  # doctest: +SKIP
        >>> content["summary"]  # doctest: +SKIP
    """
    options = options or ProbeOptions()
    spec = _read_encoder_spec(encoder)
    network: Any = load_encoder(encoder).to(choose_device(options.device))
    levels = _check_levels(options.levels, len(network.channels))
    if options.protocol not in PROBES:
        raise UsageError(f"--protocol {options.protocol}: expected one of {', '.join(PROBES)}.")
    task = TASKS[PROBES[options.protocol].task]
    cohort = options.cohort or _open_cohort(index, task, spec, options)
    contamination = _check_encoder_contamination(encoder, cohort, fail_on_contamination=options.fail_on_contamination)
    subsets = draw_probe_subsets(cohort, task, options.budgets, options.seeds)
    with output_folder(out, "probe", overwrite=options.overwrite, inputs=[encoder, index.root]) as folder:
        arms = _iterate_arms(network, spec, cohort, levels, [seed for _, seed in subsets], baselines=options.baselines)
        rows, cases = _measure_arms(options.protocol, arms, subsets, cohort)
        content = {
            "schema_version": SCHEMA_VERSION,
            "command": "probe",
            "protocol": options.protocol,
            "encoder_sha256": spec.sha256,
            "levels": levels,
            **_describe_images(task, cohort, contamination),
            "split_seed": options.split_seed,
            "index_hash": index.hash,
            "rows": rows,
            "summary": summarise_probes(rows, task.metrics),
        }
        if options.cohort is None:  # of a study, the folder of the study has it
            write_rejections(folder / REJECTIONS_FILE, (*index.rejected, *cohort.rejections))
        write_parquet(folder / "cases.parquet", pa.concat_tables(cases))
        write_json(folder / "probe.json", content)
    return content


def _open_cohort(index: Index, task: Task, spec: ModelSpec, options: ProbeOptions) -> Cohort:
    return open_probe_cohort(
        index,
        task,
        spec,
        split_seed=options.split_seed,
        store=options.store,
        fail_on_contamination=options.fail_on_contamination,
    )


def _check_encoder_contamination(
    encoder: Path, cohort: Cohort, *, fail_on_contamination: bool
) -> ContaminationCounts | None:
    cases = cohort.cases(cohort.labelled_records("val"))
    return check_contamination(
        load_training_history(encoder),
        cases,
        weights_name=f"encoder {encoder}",
        fail_on_contamination=fail_on_contamination,
    )


def summarise_probes(rows: Sequence[ProbeRow], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Mean and standard deviation of metrics over the subsets, by features and budget.

    A single subset has no standard deviation; it has the interval over subjects (`ci_low`, `ci_high`) of its row.
    """
    groups: dict[tuple[str, str], list[ProbeRow]] = defaultdict(list)
    for row in rows:
        groups[row["features"], row["budget"]].append(row)
    return [
        {
            "features": features,
            "budget": name,
            "subsets": len(group),
            **{metric: _average_subsets(metric, group) for metric in metrics},
        }
        for (features, name), group in groups.items()
    ]


def _iterate_arms(
    encoder: Any, spec: ModelSpec, cohort: Cohort, levels: Sequence[int], seeds: Sequence[int], *, baselines: bool
) -> Iterator[tuple[str, Sequence[int], Array]]:
    """Iterate over arms: name, applicable seeds, and features (N, d) of the images."""
    train, volumes = cohort.records("train"), VolumeCache(cohort)
    feature_records = cohort.labelled_records("train") + cohort.labelled_records("val")

    def compute_features(network: Any) -> Array:
        """Compute the features (N, d) of the images.

        Raises:
            UserError: the network does not accept images of this size, or its features are not finite.
        """
        batches = batch_images(volume.array for volume in volumes.read_volumes(feature_records))
        try:
            features = extract_features(network, batches, maps=levels)
        except RuntimeError as error:
            raise UserError(
                f"encoder: it does not accept whole preprocessed images ({error}). It was "
                f"trained on {list(spec.input_shape)}; pretrain with a preprocessing that ends in that shape "
                "(pad_or_crop or resize), or with summary: mean_max."
            ) from error
        return check_finite_features(features, "encoder")

    yield "encoder", seeds, compute_features(encoder)
    if baselines:
        for seed in dict.fromkeys(seeds):
            device = str(next(encoder.parameters()).device)
            untrained = build_random_encoder(spec, volumes.read_volumes(train), seed=seed, device=device)
            yield "random", [seed], compute_features(untrained)
        fit_images, images = volumes.read_volumes(train), volumes.read_volumes(feature_records)
        yield "pixels", seeds, principal_components(fit_images, images, shape=spec.input_shape)


def _measure_arms(
    protocol: str,
    arms: Iterator[tuple[str, Sequence[int], Array]],
    subsets: Mapping[tuple[Budget, int], Sequence[ImageRecord]],
    cohort: Cohort,
) -> tuple[list[ProbeRow], list[pa.Table]]:
    """Evaluate each arm, budget and seed: one row each, and the cases behind it."""
    rows, cases = [], []
    for name, seeds, features in arms:
        log.info("%s: %d features of %d images", name, features.shape[1], len(features))
        for (budget, seed), subset in subsets.items():
            if seed in seeds:
                prediction = _predict_validation(protocol, features, cohort, subset, seed)
                keys = {"features": name, "budget": budget.name, "seed": seed}
                n_resamples = N_RESAMPLES if sum(other == budget for other, _ in subsets) == 1 else 0
                row = _build_probe_row(protocol, budget, subset, prediction, cohort, n_resamples=n_resamples)
                rows.append({**keys, **row})
                cases.append(_build_case_table(protocol, keys, prediction, cohort))
    return rows, cases


def _predict_validation(
    protocol: str, features: Array, cohort: Cohort, subset: Sequence[ImageRecord], seed: int
) -> ProbePrediction:
    subset_images = {record.image for record in subset}
    labelled = cohort.labelled_records("train")
    row_numbers = [row_number for row_number, record in enumerate(labelled) if record.image in subset_images]
    train_features, val_features = features[row_numbers], features[len(labelled) :]
    probe, groups = PROBES[protocol], number_subjects(subset)
    targets = _encode_targets(TASKS[probe.task], cohort, subset)
    return probe.predict(train_features, targets, val_features, seed=seed, groups=groups)


def _build_probe_row(
    protocol: str,
    budget: Budget,
    subset: Sequence[ImageRecord],
    prediction: ProbePrediction,
    cohort: Cohort,
    *,
    n_resamples: int,
) -> ProbeRow:
    """Metrics of one probe; intervals over subjects only where no spread over subsets can be given."""
    task, val = TASKS[PROBES[protocol].task], cohort.labelled_records("val")
    statistics = build_statistics(task.name, prediction.predictions, _encode_targets(task, cohort, val))
    estimates = bootstrap_intervals(statistics, [record.subject for record in val], resamples=n_resamples)
    return {
        "protocol": protocol,
        "labelled": budget.labelled,
        "fraction": budget.fraction,
        "n_labelled": len(subset),
        "subset": json_sha256([record.image for record in subset])[:12],
        **{name: estimate["value"] for name, estimate in estimates.items()},
        "intervals": {name: [estimate["ci_low"], estimate["ci_high"]] for name, estimate in estimates.items()}
        if n_resamples
        else None,
        **prediction.settings,
    }


def _build_case_table(protocol: str, keys: dict[str, Any], prediction: ProbePrediction, cohort: Cohort) -> pa.Table:
    task, val = TASKS[PROBES[protocol].task], cohort.labelled_records("val")
    columns: dict[str, Any] = {
        name: [getattr(record, name) for record in val] for name in ("image", "subject", "label")
    }
    columns |= {name: [value] * len(val) for name, value in keys.items()}
    columns |= task.to_probe_columns(prediction.predictions, val, _list_classes(task, cohort))
    return pa.table(columns)


def _list_classes(task: Task, cohort: Cohort) -> tuple[str, ...]:
    """Classes that a probe predicts: those of the training split, or the one target of a regression."""
    return cohort.classes if task.has_class_labels else task.class_names(cohort.index)


def _encode_targets(task: Task, cohort: Cohort, records: Sequence[ImageRecord]) -> Array:
    """Class indices or numbers, (N,)."""
    targets = task.encode_targets(records, _list_classes(task, cohort))
    assert targets is not None  # no probe has masks as targets
    return targets.reshape(len(records))


def _average_subsets(metric: str, rows: Sequence[ProbeRow]) -> dict[str, float | None]:
    values = [row[metric] for row in rows if row[metric] is not None]
    mean, sd = float(np.mean(values)) if values else None, float(np.std(values, ddof=1)) if len(values) > 1 else None
    intervals = rows[0].get("intervals") if len(rows) == 1 else None
    low, high = intervals[metric] if intervals else (None, None)
    return {"mean": mean, "sd": sd, "ci_low": low, "ci_high": high}


def _describe_images(task: Task, cohort: Cohort, contamination: ContaminationCounts | None) -> dict[str, Any]:
    val = cohort.labelled_records("val")
    return {
        "classes": list(_list_classes(task, cohort)),
        "n": len(val),
        "subjects": len({record.subject for record in val}),
        "contamination": contamination,
        "train_val_duplicates": cohort.overlap,
        "rejected": len(cohort.rejections),
        "split": "val",
    }


def _read_encoder_spec(path: Path) -> ModelSpec:
    spec = locate_weights(path)[1]
    if not spec.is_encoder:
        raise UserError(
            f"{path}: expected a pretrained encoder, got a {spec.kind}, which was trained on labels: a probe of it "
            "would not measure pretraining. Give the run that it started from, or use `medim evaluate`."
        )
    return spec


def _check_levels(levels: Sequence[int] | None, count: int) -> list[int]:
    invalid = [level for level in levels or () if not 0 <= level < count]
    if invalid:
        raise UsageError(f"--levels {invalid[0]}: expected a level of the encoder, 0 (finest) to {count - 1}.")
    return list(range(count)) if levels is None else sorted(set(levels))
