"""Fine-tune an encoder on few labels, or train the same network from scratch with the same schedule."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch

from medim.config import FinetuneConfig
from medim.console.progress import show_progress
from medim.data.contamination import ContaminationCounts, TrainingHistory, check_contamination, load_training_history
from medim.data.index.index import ImageRecord, Index
from medim.data.index.records import write_rejections
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import LabelledDataset
from medim.data.loading.splits import select_label_budget, warn_label_shortage, write_splits
from medim.evaluation.cases import CaseSummary, write_cases
from medim.evaluation.evaluate import validate_network
from medim.files import write_csv, write_json
from medim.metrics.segmentation import METRIC_RULE
from medim.model_spec import SCHEMA_VERSION, ModelSpec, read_spec
from medim.models.model import Model, as_numpy_function, build_model
from medim.models.serialization import load_weights, locate_weights, save_model
from medim.output_folder import REJECTIONS_FILE, OutputRecord, read_record
from medim.signals import handle_shutdown_signals
from medim.tasks.task import CaseRow
from medim.tracking.lineage import Source, make_source
from medim.tracking.target import check_target
from medim.tracking.tracker import Tracker, flatten_estimates
from medim.tracking.tracking import log_results, track_run
from medim.training.engine.checkpoints import find_newest_checkpoint, get_resume_steps, list_corrupt_checkpoints
from medim.training.engine.launch import find_device
from medim.training.engine.progress import choose_progress
from medim.training.engine.sampler import StepSampler, step_loader
from medim.training.engine.trainer import make_trainer, peak_memory, run_trainer
from medim.training.finetune.config import dry_run_finetuning
from medim.training.finetune.head_init import start_head_as_probe
from medim.training.finetune.lost_classes import find_lost_classes, warn_of_lost_classes
from medim.training.finetune.module import FinetuneModule, ValidationCallback
from medim.training.finetune.options import FinetuneOptions
from medim.training.finetune.summary import ClassCounts, FinetuneSummary
from medim.training.finetune.targets import check_class_weights, select_head, task_of_config
from medim.training.finetune.view_figure import draw_labelled_views
from medim.training.fit_ood import (
    count_detector_images,
    estimate_validation_seconds,
    rehearse_ood_detector,
    save_ood_detector,
)
from medim.training.pretrain.history import HISTORY_COLUMNS
from medim.training.run_folder import (
    log_failure,
    open_rehearsal_folder,
    open_run_folder,
    read_finished_summary,
    write_config,
)
from medim.types import UserError
from medim.version import collect_versions

log = logging.getLogger(__name__)
HEAD_PROBE_BATCHES = 32  # largest number of batches for the initialisation of the head


@dataclass(frozen=True, kw_only=True)
class _LabelledData:
    """Images of a run: training images within the label budget, and validation images."""

    cohort: Cohort
    train: Sequence[ImageRecord]
    val: Sequence[ImageRecord]
    encoder_history: TrainingHistory | None  # of the initial weights; None if they have no record
    contamination: ContaminationCounts | None


@dataclass(frozen=True, kw_only=True)
class _FinetuneRun:
    """Parts of a run that is ready to train."""

    config: FinetuneConfig
    options: FinetuneOptions
    out: Path
    data: _LabelledData
    spec: ModelSpec
    module: FinetuneModule


@handle_shutdown_signals()
def finetune(
    config: FinetuneConfig, index: Index, out: Path, options: FinetuneOptions | None = None, **changes: Any
) -> FinetuneSummary:
    """Fine-tune within a label budget, and evaluate on the validation split.

    The schedule is fixed, so no split is used for selection.

    Args:
        config: configuration of the run.
        index: index of the images, some of them labelled.
        out: folder of the run.
        options: initial weights, label budget, seeds and the handling of `out`; None uses the defaults.
        **changes: single options by name, such as `labelled=50`; they replace those of `options`.

    Returns:
        Content of `summary.json`.

    Raises:
        UserError: there are no labels for the task, the weights do not match, `out` is not empty, the
            device is not available, or `fail_on_contamination` applies.
        UsageError: a section cannot be built, or the parts are not compatible.
        StoppedError: Ctrl-C, SIGTERM or SIGUSR1 arrived; a checkpoint was saved.
    """
    start_time = time.perf_counter()
    options = replace(options or FinetuneOptions(), **changes)
    config = select_head(config, index)
    dry_run_finetuning(config, options.encoder)
    check_class_weights(config, index)
    find_device(options.accelerator)
    inputs = [path for path in (options.encoder, index.root) if path is not None]
    record = read_record(out) if options.resume else None
    with open_run_folder(out, "finetune", overwrite=options.overwrite, resume=options.resume, inputs=inputs) as folder:
        return _finetune_in(folder, config, index, options, start_time, record)


def _finetune_in(
    out: Path,
    config: FinetuneConfig,
    index: Index,
    options: FinetuneOptions,
    start_time: float,
    record: OutputRecord | None,
) -> FinetuneSummary:
    """Train and measure in a prepared folder; a study has already checked the tracking server for its runs."""
    if options.parent_run is None:
        check_target(out if options.resume else None)
    data = _open_labelled_data(config, index, options)
    run = _build_run(config, data, out, options)
    checkpoint, start_step = _prepare_run_folder(run)
    finished = read_finished_summary(out, record)
    if finished is not None:
        return cast(FinetuneSummary, finished)
    if config.head_init == "probe" and not checkpoint:
        _initialise_head(run)
    with _open_tracker(run) as tracker:
        _warn_of_missing_classes(run)
        after_seconds = _rehearse_model(run)
        _train(run, checkpoint, start_step, after_seconds)
        _save_model(run)
        summary = _measure(run, start_time)
        with log_failure("records of the results for MLflow", "The run folder contains all results."):
            _log_summary(tracker, summary, out)
    return summary


def _open_labelled_data(config: FinetuneConfig, index: Index, options: FinetuneOptions) -> _LabelledData:
    """Preprocess the images, draw the label budget, and check the encoder for images of the validation split."""
    cohort = options.cohort or open_labelled_cohort(
        config,
        index,
        split_seed=options.split_seed,
        store=options.store,
        jobs=options.jobs,
        fail_on_contamination=options.fail_on_contamination,
    )
    train = select_label_budget(
        cohort.records("train"), labelled=options.labelled, fraction=options.label_fraction, seed=options.label_seed
    )
    if options.cohort is None:  # a study has reported it
        warn_label_shortage(cohort.records("train"), options.labelled)
    val, weights = cohort.records("val"), options.initial_weights
    encoder_history = load_training_history(weights) if weights else TrainingHistory()
    weights_name = f"encoder {options.encoder}" if options.encoder else "fresh weights"
    contamination = check_contamination(
        encoder_history,
        cohort.cases(val),
        weights_name=weights_name,
        fail_on_contamination=options.fail_on_contamination,
    )
    return _LabelledData(
        cohort=cohort, train=train, val=val, encoder_history=encoder_history, contamination=contamination
    )


def _build_run(config: FinetuneConfig, data: _LabelledData, out: Path, options: FinetuneOptions) -> _FinetuneRun:
    """Build the model from the seed, and load the initial weights."""
    pl.seed_everything(options.seed, workers=False, verbose=False)
    spec = build_model_spec(config, data.cohort, options.seed, options.split_seed, data.train)
    model, pretrained, spec = _prepare_model(config, spec, options.initial_weights)
    module = FinetuneModule(model, config, pretrained)
    return _FinetuneRun(config=config, options=options, out=out, data=data, spec=spec, module=module)


def _prepare_run_folder(run: _FinetuneRun) -> tuple[Path | None, int]:
    """Write configuration and split, and find the checkpoint to resume from.

    Returns:
        The checkpoint and its step; (None, 0) for a new run.
    """
    out, options, cohort = run.out, run.options, run.data.cohort
    write_config(
        out,
        run.config,
        seed=options.seed,
        split_seed=options.split_seed,
        where=cohort.index.where,
        index_hash=cohort.index.hash,
        parent=run.spec.provenance.parent,
        labelled=options.labelled,
        label_fraction=options.label_fraction,
        subset_seed=options.label_seed,
    )
    if options.cohort is None:  # of a study, the folder of the study has it
        write_rejections(out / REJECTIONS_FILE, (*cohort.index.rejected, *cohort.rejections))
    split, train = out / "split.csv", cohort.records("train")
    write_splits(split, cohort.index, cohort.splits, train, seed=options.label_seed, labelled_records=run.data.train)
    return find_newest_checkpoint(out / "checkpoints") if options.resume else (None, 0)


def _train(run: _FinetuneRun, checkpoint: Path | None, start_step: int, after_seconds: float = 0.0) -> None:
    """Train to the last step of the schedule.

    Args:
        run: parts of the run.
        checkpoint: checkpoint to resume from.
        start_step: its step.
        after_seconds: estimated time after the last step.
    """
    config, data, spec = run.config, run.data, run.spec
    steps, every = config.eval_steps or (), config.checkpoint_every_steps
    validation = ValidationCallback(steps, every, run.out, data.cohort.index, data.val, spec)
    trainer = make_trainer(
        config,
        run.out,
        logger=False,
        callbacks=[validation, choose_progress(lambda: validation.status, after_seconds=after_seconds)],
        accelerator=run.options.accelerator,
        validate=False,
    )
    loader = build_finetune_loader(
        config,
        data.cohort,
        data.train,
        spec.classes,
        steps=config.max_steps,
        seed=run.options.seed,
        start=start_step,
    )
    run_trainer(trainer, run.module, loader, checkpoint=checkpoint)


def _rehearse_model(run: _FinetuneRun) -> float:
    """Write the model, and compute the features of one image for the detector, before the first step.

    What fails here would otherwise fail after the last step.

    Returns:
        Estimated time after the last step, in seconds.

    Raises:
        UserError: the weights cannot be written.
    """
    with open_rehearsal_folder(run.out) as folder:
        try:
            save_model(folder, "model", run.module.model, run.spec)
        except RuntimeError as error:
            raise UserError(
                f"config {run.config.name}: the weights of this model cannot be written ({error}). Use another encoder."
            ) from error
    data, model, options = run.data, run.module.model, run.options
    if options.cohort is None:  # no cell of a study
        with log_failure("figures/views.png", "The run continues without it."):
            draw_labelled_views(run.out, _build_labelled_dataset(run.config, data.cohort, data.train, run.spec.classes))
    if torch.accelerator.is_available():  # not run
        run.module.to(find_device(options.accelerator))
    seconds = estimate_validation_seconds(model, data.cohort, data.val, run.spec)
    if options.fit_ood_detector:
        seconds += rehearse_ood_detector(model, data.cohort, run.spec) * count_detector_images(data.cohort)
    return seconds


def _save_model(run: _FinetuneRun) -> None:
    """Write the model, its detector, its losses and the record of its training images."""
    out, data, model = run.out, run.data, run.module.model.eval()
    write_csv(out / "history.csv", HISTORY_COLUMNS, run.module.rows)
    save_model(out / "model", "model", model, run.spec)
    if run.options.fit_ood_detector:
        save_ood_detector(out / "model", model, data.cohort, run.spec)
    history = _build_unknown_history(run.options.encoder) if data.encoder_history is None else data.encoder_history
    history.extended("finetune", data.cohort.cases(data.train)).write(out / "model")


def _measure(run: _FinetuneRun, start_time: float) -> FinetuneSummary:
    """Measure the model on the validation split, and write `cases.parquet` and `summary.json`."""
    cohort, out, model = run.data.cohort, run.out, run.module.model
    evaluation, rows = _evaluate_validation(model, cohort.index, run.data.val, run.spec, out / "cases.parquet")
    lost = find_lost_classes(model, cohort, run.data.train, rows, run.spec)
    warn_of_lost_classes(lost, cohort, run.data.train, run.spec, run.config)
    summary = _build_finetune_summary(run, evaluation, lost, start_time)
    write_json(out / "summary.json", summary)
    return summary


@contextmanager
def _open_tracker(run: _FinetuneRun) -> Iterator[Tracker]:
    """Open the MLflow run, with the encoder that the model starts from."""
    options, parent = run.options, run.spec.provenance.parent
    inputs = {
        "seed": options.seed,
        "split_seed": options.split_seed,
        "subset_seed": options.label_seed,
        "init": "pretrained" if parent else "scratch",
        "encoder_sha256": parent,
        "labelled": options.labelled,
        "label_fraction": options.label_fraction,
        "n_labelled": len(run.data.train),
        "where": run.data.cohort.index.public_where,
        "index_hash": run.data.cohort.index.hash,
        "metric_rule": METRIC_RULE,
    }
    sources: list[Source] = []
    if parent and options.initial_weights:
        step = "encoder" if locate_weights(options.initial_weights)[1].is_encoder else "model"
        sources = [make_source(step, parent, options.initial_weights)]
    with track_run(
        "finetune", run.config, run.out, inputs=inputs, sources=sources, parent=options.parent_run
    ) as tracker:
        yield tracker


def _log_summary(tracker: Tracker, summary: FinetuneSummary, out: Path) -> None:
    metrics = flatten_estimates(summary["val"]["metrics"], "val/") if summary["val"] else {}
    losses = {f"loss/{name}": value for name, value in summary["loss"].items()}
    log_results(
        tracker, {**summary, **losses, **metrics}, [out / "config.yaml", out / "summary.json", out / "history.csv"]
    )
    tracker.log_weights("model", read_spec(out / "model" / "model.json").sha256)


def open_labelled_cohort(
    config: FinetuneConfig,
    index: Index,
    *,
    split_seed: int,
    store: Path | None = None,
    jobs: int = 1,
    fail_on_contamination: bool = False,
) -> Cohort:
    """Open the images of an index that have targets for the task; see `medim.data.loading.cohort.open_cohort`.

    Raises:
        UserError: there are no such images; or see `open_cohort`.
    """
    steps = config.preprocessing
    records = _select_labelled(config, index)
    return open_cohort(
        index,
        records,
        steps,
        split_seed=split_seed,
        store=store,
        jobs=jobs,
        fail_on_contamination=fail_on_contamination,
    )


def _select_labelled(config: FinetuneConfig, index: Index) -> list[ImageRecord]:
    """Select the images with targets for the task."""
    task = task_of_config(config)
    records = [record for record in index.records if getattr(record, task.target_field) is not None]
    if not records:
        raise UserError(task.describe_missing_targets(index))
    if training_error := task.find_training_error(index):
        raise UserError(training_error)
    return records


def _evaluate_validation(
    model: Model, index: Index, val: Sequence[ImageRecord], spec: ModelSpec, cases: Path
) -> tuple[CaseSummary | None, list[CaseRow]]:
    """Evaluate the model on the validation split and write the cases; None and no cases if the split is empty."""
    log.info("measuring on %d validation images", len(val))
    show = show_progress("measured", "validation images")
    evaluation, rows = (
        validate_network(as_numpy_function(model), index, val, spec, progress=show) if val else (None, [])
    )
    write_cases(cases, rows, spec.kind)
    return evaluation, rows


def _build_finetune_summary(
    run: _FinetuneRun, evaluation: CaseSummary | None, lost_classes: dict[str, float], start_time: float
) -> FinetuneSummary:
    config, cohort, module = run.config, run.data.cohort, run.module
    losses = [loss for _, _, loss, _, _ in module.rows if loss is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "finetune",
        "task": config.task,
        "init": "pretrained" if run.spec.provenance.parent else "scratch",
        "n_labelled": len(run.data.train),
        "n_selection_labels": run.spec.n_selection_labels,
        "class_images": _count_classes(run),
        "class_weights": _describe_class_weights(run),
        "n_unlabelled": len(cohort.index.records) - len(cohort.keys) - len(cohort.rejections),
        "steps": module.global_step,
        "resumed_from_steps": get_resume_steps(module.trainer),
        "loss": {"first": losses[0], "last": losses[-1]},
        "val": evaluation,
        "lost_classes": lost_classes,
        "peak_memory_bytes": peak_memory(),
        "device": str(module.device),
        "precision": str(module.trainer.precision),
        "config_hash": config.hash,
        "index_hash": cohort.index.hash,
        "where": cohort.index.where,
        "versions": collect_versions(),
        "corrupt_checkpoints": list_corrupt_checkpoints(run.out / "checkpoints"),
        "train_val_duplicates": cohort.overlap,
        "contamination": run.data.contamination,
        "seconds": time.perf_counter() - start_time,
    }


def _count_classes(run: _FinetuneRun) -> dict[str, ClassCounts]:
    """Count the training and validation images with each class."""
    task, classes, list_classes = task_of_config(run.config), run.spec.classes, run.data.cohort.list_mask_classes
    train, val = (task.count_class_images(part, classes, list_classes) for part in (run.data.train, run.data.val))
    return {name: {"train": train[name], "val": val[name]} for name in train}


def _warn_of_missing_classes(run: _FinetuneRun) -> None:
    """Log a warning for classes that no labelled training image has, such as those of empty masks."""
    missing = [name for name, count in _count_classes(run).items() if not count["train"]]
    if missing:
        log.warning(
            "none of the %d labelled training images has: %s. The model cannot learn this; label images that have it",
            len(run.data.train),
            ", ".join(missing),
        )


def _describe_class_weights(run: _FinetuneRun) -> dict[str, float] | None:
    """Weights of the classes in the loss, by name; None if there are none."""
    weights = (run.spec.head or {}).get("class_weights")
    if not isinstance(weights, list | tuple):
        return None
    return dict(zip(task_of_config(run.config).output_names(run.spec.classes), weights, strict=True))


def _prepare_model(
    config: FinetuneConfig, spec: ModelSpec, encoder: Path | None
) -> tuple[Model, list[torch.nn.Module], ModelSpec]:
    """Build the model, load the weights of an encoder, record the parent in `spec`, and freeze parts if configured.

    Returns:
        The model, and its pretrained parts.
    """
    model = build_model(spec)
    pretrained: list[torch.nn.Module] = []
    if encoder:
        parent, pretrained = _load_pretrained(model, encoder)
        if parent.n_selection_labels:
            log.warning(
                "%d labels of training subjects selected the step of the encoder, in addition to the label budget. To "
                "avoid this, pretrain with checkpoint_selection=loss, the default",
                parent.n_selection_labels,
            )
        origin = replace(spec.provenance, parent=parent.sha256, n_selection_labels=parent.n_selection_labels)
        spec = replace(spec, provenance=origin)
    if config.pretrained_lr_scale == 0:
        model.freeze(pretrained)
    return model, pretrained, spec


def _load_pretrained(model: Model, encoder: Path) -> tuple[ModelSpec, list[torch.nn.Module]]:
    """Load the weights of an encoder, and those of its decoder if both sides have one.

    Returns:
        Spec of the encoder, and the loaded parts of the model.
    """
    weights, spec = locate_weights(encoder)
    if not spec.is_encoder:
        load_weights(model.encoder, weights, prefix="encoder.")
        return spec, [model.encoder]
    load_weights(model.encoder, weights)
    decoder = weights.with_name("decoder.safetensors")
    if model.decoder is None or not decoder.is_file():
        return spec, [model.encoder]
    load_weights(model.decoder, decoder)
    return spec, [model.encoder, model.decoder]


def _build_unknown_history(encoder: Path | None) -> TrainingHistory:
    """Build the training history of weights without a record of their training images."""
    pretrained = encoder is None or locate_weights(encoder)[1].is_encoder
    return TrainingHistory(unknown_kinds=("pretrain",) if pretrained else ("pretrain", "finetune"))


def _initialise_head(run: _FinetuneRun) -> None:
    """Initialise the head as a probe of the labelled images, at most `HEAD_PROBE_BATCHES` batches, unaugmented."""
    config = run.config.model_copy(update={"balanced_batches": False})  # each image once
    data, classes, seed = run.data, run.spec.classes, run.options.seed
    n_batches = min(HEAD_PROBE_BATCHES, -(-len(data.train) // config.batch_size))
    batches = build_finetune_loader(config, data.cohort, data.train, classes, steps=n_batches, seed=seed, augment=False)
    run.module.to(find_device(run.options.accelerator))
    start_head_as_probe(run.module.model, batches, classes=run.spec.out_channels or 0, seed=seed)


def build_finetune_loader(
    config: FinetuneConfig,
    cohort: Cohort,
    records: Sequence[ImageRecord],
    classes: Sequence[str],
    *,
    steps: int,
    seed: int,
    start: int = 0,
    augment: bool = True,
) -> Any:
    """Build a loader of labelled images (N, C, ...) and targets, one batch per step, beginning with step `start`."""
    dataset = _build_labelled_dataset(config, cohort, records, classes, augment=augment)
    # Every labelled image is used, including several of one subject.
    groups = [str(r.label) if config.balanced_batches else r.image for r in records]
    sampler = StepSampler(groups, batch_size=config.batch_size, steps=steps, seed=seed, start=start)
    return step_loader(dataset, sampler, workers=config.workers, prefetch=config.prefetch)


def _build_labelled_dataset(
    config: FinetuneConfig,
    cohort: Cohort,
    records: Sequence[ImageRecord],
    classes: Sequence[str],
    *,
    augment: bool = True,
) -> LabelledDataset:
    return LabelledDataset(
        cohort.store,
        cohort.store_keys(records),
        targets=task_of_config(config).encode_targets(records, classes),
        shape=config.views.shape,
        augmentations=config.views.augmentations if augment else (),
        foreground_share=config.views.foreground_share,
    )


def build_model_spec(
    config: FinetuneConfig, cohort: Cohort, seed: int, split_seed: int, records: Sequence[ImageRecord] = ()
) -> ModelSpec:
    """Build the spec of the model of a run; see `medim.models.serialization`."""
    task = task_of_config(config)
    classes = task.class_names(cohort.index)
    return replace(
        cohort.build_spec(config, seed=seed, split_seed=split_seed),
        kind=task.kind,
        decoder=config.decoder,
        head=task.fit_head(config.head, records, classes, cohort.read_mask),
        out_channels=task.count_outputs(classes),
        inference=config.inference,
        classes=tuple(classes),
        class_values=task.class_values(cohort.index),
    )
