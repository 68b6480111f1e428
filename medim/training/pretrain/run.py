"""Pretrain an encoder on the images of an index, and write `RUN/encoder/`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from medim.config import PretrainConfig, list_presets, read_config
from medim.data.contamination import TrainingHistory
from medim.data.index.index import ImageRecord, Index
from medim.data.index.records import write_rejections
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import ViewDataset
from medim.data.loading.splits import assign_splits, write_splits
from medim.files import json_sha256, write_json
from medim.model_spec import ModelSpec, read_spec
from medim.models.model import build_decoder, build_encoder
from medim.models.serialization import check_finite_weights
from medim.output_folder import REJECTIONS_FILE, OutputRecord, read_record
from medim.signals import handle_shutdown_signals
from medim.tracking.target import check_target, is_tracking_enabled
from medim.tracking.tracker import Tracker
from medim.tracking.tracking import log_encoder, log_results, track_run
from medim.training.engine.checkpoints import find_newest_checkpoint, list_corrupt_checkpoints
from medim.training.engine.gradients import weight_norm
from medim.training.engine.launch import find_device, launched, planned_group
from medim.training.engine.process_group import ProcessGroup
from medim.training.engine.progress import choose_progress
from medim.training.engine.sampler import StepSampler, step_loader
from medim.training.engine.tracking_logger import TrackingLogger
from medim.training.engine.trainer import make_trainer, return_to_device, run_trainer
from medim.training.fit_ood import count_detector_images, rehearse_ood_detector, save_ood_detector
from medim.training.pretrain.checkpoint_selection import CheckpointSelection
from medim.training.pretrain.config import build_objectives, dry_run_pretraining, has_unused_parameters
from medim.training.pretrain.figures import draw_phantom_views, draw_training_figures
from medim.training.pretrain.history import MetricHistory
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.online_probe import AlignmentMetric, OnlineProbe, open_probe
from medim.training.pretrain.options import PretrainOptions
from medim.training.pretrain.save_encoder import write_encoder
from medim.training.pretrain.summary import build_pretrain_summary, format_online_probe
from medim.training.pretrain.verdict import describe_shortfall
from medim.training.pretrain.view_figure import draw_views
from medim.training.run_folder import (
    log_failure,
    open_rehearsal_folder,
    open_run_folder,
    read_finished_summary,
    write_config,
)
from medim.types import UserError
from medim.version import __version__

log = logging.getLogger(__name__)
VAL_BATCHES = 8
FIGURE_SECONDS = 20.0  # shortest time between two drawings of the figures during training


@dataclass(frozen=True, kw_only=True)
class _PretrainRun:
    """Parts of a run that is ready to train."""

    config: PretrainConfig
    options: PretrainOptions
    out: Path
    group: ProcessGroup
    cohort: Cohort
    spec: ModelSpec
    module: PretrainModule
    history: MetricHistory
    probe: OnlineProbe | None


@handle_shutdown_signals()
def pretrain(
    config: PretrainConfig, index: Index, out: Path, options: PretrainOptions | None = None, **changes: Any
) -> dict[str, Any]:
    """Pretrain on the training split of an index, and validate on its validation split.

    Args:
        config: configuration of the run.
        index: index of the images; labels are used only by the online probe.
        out: folder of the run.
        options: seeds, devices and the handling of `out`; None uses the defaults.
        **changes: single options by name, such as `seed=1`; they replace those of `options`.

    Returns:
        Content of `summary.json`.

    Raises:
        UserError: there are too few subjects, `out` is not empty, a device is not available, or the weights at the end
            are not finite (`history.csv` is written, but no encoder).
        UsageError: a section cannot be built, or the run cannot be distributed over the devices.
        StoppedError: Ctrl-C, SIGTERM or SIGUSR1 arrived; a checkpoint was saved.
    """
    start_time = time.perf_counter()
    options = replace(options or PretrainOptions(), **changes)
    plan = planned_group(options.accelerator, options.devices, options.nodes)
    dry_run_pretraining(config, plan)
    with launched(options.accelerator, plan) as group, _open_folder(config, index, out, options, group) as opened:
        out, record = opened
        _check_subject_count(index, options, group)
        cohort = _open_run_cohort(index, config, options, group)
        config = _fit_batch_size(config, cohort, group)
        checkpoint, start_step = _prepare_run_folder(config, cohort, out, options, group)
        finished = group.broadcast(read_finished_summary(out, record) if options.resume and group.is_main else None)
        if finished is not None:
            return finished
        run = _build_run(config, cohort, out, options, group)
        with _open_tracker(run) as tracker:
            after_seconds = _rehearse_results(run) if group.is_main else 0.0
            trainer = _train(run, tracker, checkpoint, start_step, after_seconds)
            selection = _restore_selection(run.history, run.module, trainer.global_step, run.probe)
            summary = _summarise_run(run, trainer, selection)
            if tracker is not None:
                _save_results(run, tracker, summary, start_time)
    return summary


@contextmanager
def _open_folder(
    config: PretrainConfig, index: Index, out: Path, options: PretrainOptions, group: ProcessGroup
) -> Iterator[tuple[Path, OutputRecord | None]]:
    """Check that all processes have the same inputs, and lock the folder of the run in the first one.

    Yields:
        Folder to train in, and the record of the folder before this command.
    """
    flags = {"resume": options.resume, "stop_on_collapse": options.stop_on_collapse}
    group.check_same(medim=__version__, config=config.hash, index=index.hash, **options.seeds, **flags)
    with ExitStack() as stack:
        folder, record = out, read_record(out)
        with group.main_process_first():
            if group.is_main:
                flags = {"overwrite": options.overwrite, "resume": options.resume}
                folder = stack.enter_context(open_run_folder(out, "pretrain", **flags, inputs=[index.root]))
                check_target(folder if options.resume else None)
        yield group.broadcast(folder), record


def _check_subject_count(index: Index, options: PretrainOptions, group: ProcessGroup) -> None:
    """Check the number of training subjects before images are preprocessed.

    Raises:
        UserError: there are too few.
    """
    splits = assign_splits(index, seed=options.split_seed)
    n_train = len({record.subject for record in index.records if splits[record.image] == "train"})
    if n_train < max(2, group.count):
        raise _build_subject_error(n_train, len({record.subject for record in index.records}), group, index)


def _build_subject_error(n_train: int, n_subjects: int, group: ProcessGroup, index: Index) -> UserError:
    return UserError(
        index.append_selection(
            f"pretraining: expected at least {max(2, group.count)} subjects to train on, got {n_train} of {n_subjects} "
            "in all. Add images of other patients, or check the subjects of the images (--subjects)."
        )
    )


def _open_run_cohort(index: Index, config: PretrainConfig, options: PretrainOptions, group: ProcessGroup) -> Cohort:
    """Preprocess the images, in the first process before the others."""
    with group.main_process_first():
        cohort = open_cohort(
            index,
            index.records,
            config.preprocessing,
            split_seed=options.split_seed,
            store=options.store,
            jobs=options.jobs,
        )
    group.check_same(images=json_sha256(sorted(cohort.keys)))
    return cohort


def _prepare_run_folder(
    config: PretrainConfig, cohort: Cohort, out: Path, options: PretrainOptions, group: ProcessGroup
) -> tuple[Path | None, int]:
    """Write configuration and split, and find the checkpoint to resume from.

    Returns:
        The checkpoint and its step; (None, 0) for a new run.
    """
    checkpoint: tuple[Path | None, int] = None, 0
    with group.main_process_first():
        if group.is_main:
            train = cohort.records("train")
            write_config(out, config, **options.seeds, where=cohort.index.where, index_hash=cohort.index.hash)
            write_rejections(out / REJECTIONS_FILE, (*cohort.index.rejected, *cohort.rejections))
            write_splits(out / "split.csv", cohort.index, cohort.splits, train, seed=options.seed)
            checkpoint = find_newest_checkpoint(out / "checkpoints") if options.resume else checkpoint
    return group.broadcast(checkpoint)


def _build_run(
    config: PretrainConfig, cohort: Cohort, out: Path, options: PretrainOptions, group: ProcessGroup
) -> _PretrainRun:
    """Build networks, objectives and metrics from the seed."""
    pl.seed_everything(options.seed, workers=False, verbose=False)
    spec = replace(cohort.build_spec(config, **options.seeds), decoder=config.decoder)
    module = _build_module(config, spec, options.seed, group)
    history, probe = _build_history(
        config, cohort, module, seed=options.seed, stop_on_collapse=options.stop_on_collapse
    )
    return _PretrainRun(
        config=config,
        options=options,
        out=out,
        group=group,
        cohort=cohort,
        spec=spec,
        module=module,
        history=history,
        probe=probe,
    )


@contextmanager
def _open_tracker(run: _PretrainRun) -> Iterator[Tracker | None]:
    """Open the MLflow run in the first process; the others get None."""
    if not run.group.is_main:
        yield None
        return
    inputs = {**run.options.seeds, "where": run.cohort.index.public_where, "index_hash": run.cohort.index.hash}
    with track_run("pretrain", run.config, run.out, inputs=inputs) as tracker:
        yield tracker


def _train(
    run: _PretrainRun, tracker: Tracker | None, checkpoint: Path | None, start_step: int, after_seconds: float = 0.0
) -> pl.Trainer:
    """Train to the last step, and validate after it.

    Args:
        run: parts of the run.
        tracker: tracker of the run, in the first process.
        checkpoint: checkpoint to resume from.
        start_step: its step.
        after_seconds: estimated time after the last step.
    """
    config, cohort, seed = run.config, run.cohort, run.options.seed
    loader = _build_train_loader(config, cohort, cohort.records("train"), seed=seed, start=start_step, group=run.group)
    val_loader = _build_val_loader(config, cohort, cohort.records("val"), seed=seed)
    validate = val_loader is not None
    if run.group.is_main:
        run.history.on_validated = _write_history_during(run)
    run.history.set_validation(val_loader, every=min(config.checkpoint_every_steps, config.max_steps))
    trainer = make_trainer(
        config,
        run.out,
        logger=False if tracker is None else TrackingLogger(tracker),
        callbacks=[
            run.history,
            *run.options.callbacks,
            choose_progress(lambda: run.history.status, after_seconds=after_seconds),
        ],
        accelerator=run.options.accelerator,
        validate=validate,
        group=run.group,
        find_unused=run.group.count > 1 and has_unused_parameters(config),
    )
    run_trainer(trainer, run.module, loader, val_loader, checkpoint=checkpoint)
    if validate and run.history.held_out_step != trainer.global_step:
        trainer.validate(run.module, val_loader, verbose=False)
        return_to_device(trainer, run.module)
    return trainer


def _summarise_run(run: _PretrainRun, trainer: pl.Trainer, selection: dict[str, Any]) -> dict[str, Any]:
    """Build the content of `summary.json` that does not depend on the output folder."""
    summary = build_pretrain_summary(run.config, run.cohort, run.history, run.module, trainer)
    probe = format_online_probe(run.probe, selection)
    return summary | {"checkpoint_selection": selection, "probe": probe, "processes": run.group.count}


def _rehearse_results(run: _PretrainRun) -> float:
    """Write the encoder and compute the features of one image for the detector, before the first step.

    What fails here would otherwise fail after the last step.

    Returns:
        Estimated time after the last step, in seconds.

    Raises:
        UserError: the weights cannot be written.
    """
    selection = CheckpointSelection().summary(0) | {"n_labels": 0}
    with open_rehearsal_folder(run.out) as folder:
        try:
            spec = replace(run.spec, checkpoint_selection=selection)
            write_encoder(folder, run.module, spec, run.config.objectives)
        except RuntimeError as error:
            raise UserError(
                f"config {run.config.name}: the weights of the encoder cannot be written ({error}). "
                "Use another encoder."
            ) from error
    train = run.cohort.records("train")
    with log_failure("figures/views.png", "The run continues without it."):
        draw_views(run.out, run.module, _build_view_dataset(run.config, run.cohort, train))
    if not run.options.fit_ood_detector:
        return 0.0
    if torch.accelerator.is_available():  # not run
        run.module.to(find_device(run.options.accelerator))
    return rehearse_ood_detector(run.module.encoder, run.cohort, run.spec) * count_detector_images(run.cohort)


def _write_history_during(run: _PretrainRun) -> Callable[[], None]:
    """Build the function that renews `history.csv`, and the figures if the last ones are old, after a validation."""
    last = time.monotonic()

    def write_history() -> None:
        """Write the history; draw the figures at most once in `FIGURE_SECONDS`."""
        nonlocal last
        with log_failure("history.csv", "The run continues; it is written again after the next validation."):
            run.history.write(run.out / "history.csv")
            if time.monotonic() - last >= FIGURE_SECONDS:
                draw_training_figures(run.out, run.history.rows)
                last = time.monotonic()

    return write_history


def _save_results(run: _PretrainRun, tracker: Tracker, summary: dict[str, Any], start_time: float) -> None:
    """Write encoder, detector, training history and summary, and log them."""
    out, spec = run.out, run.spec
    encoder_spec = replace(spec, checkpoint_selection=summary["checkpoint_selection"])
    run.history.write(out / "history.csv")
    check_finite_weights(run.module.state_dict(), f"{out}: step {summary['checkpoint_selection']['step']}")
    write_encoder(out / "encoder", run.module, encoder_spec, run.config.objectives)
    if run.options.fit_ood_detector:
        save_ood_detector(out / "encoder", run.module.encoder, run.cohort, spec)
    log.info("writing the summary and the figures")
    trained_cases = run.cohort.cases(run.cohort.records("train"))
    TrainingHistory().extended("pretrain", trained_cases).write(out / "encoder")
    summary["corrupt_checkpoints"] = list_corrupt_checkpoints(out / "checkpoints")
    summary["seconds"] = time.perf_counter() - start_time
    write_json(out / "summary.json", summary)
    figures: list[Path] = []
    with log_failure("figures", "`medim report` draws them from history.csv."):
        figures = draw_training_figures(out, run.history.rows)
        figures += [draw_phantom_views(out, run.config)] if is_tracking_enabled() else []
    with log_failure("records of the results for MLflow", "The run folder contains all results."):
        log_results(tracker, summary, [out / "config.yaml", out / "summary.json", out / "history.csv", *figures])
        tracker.log_weights("encoder", read_spec(out / "encoder" / "encoder.json").sha256)
        log_encoder(tracker, run.config.name)


def _build_history(
    config: PretrainConfig, cohort: Cohort, module: PretrainModule, *, seed: int, stop_on_collapse: bool
) -> tuple[MetricHistory, OnlineProbe | None]:
    """Build the history of the run with its encoder metrics, and the online probe."""
    train, val = cohort.records("train"), cohort.records("val")
    probe = open_probe(config, cohort, train, seed=seed)
    alignment_metrics = [AlignmentMetric(config, cohort, val, seed=seed)] if val else []
    history = MetricHistory(
        stop_on_collapse=stop_on_collapse,
        summary_trained=any(getattr(objective, "reads_summary", True) for objective in module.objectives.values()),
        encoder_metrics=[weight_norm, *alignment_metrics, *([probe] if probe else [])],
        selection=CheckpointSelection("probe" if probe else "val_loss"),
        weights=module.weights,
        first_norm=weight_norm(module.encoder)["weight_norm"],
        shortfall=describe_shortfall(config.max_steps, _count_preset_steps(config)),
    )
    return history, probe


def _count_preset_steps(config: PretrainConfig) -> int:
    """Steps of the preset that a configuration is based on; those of the configuration if there is no such preset."""
    if config.name not in list_presets("pretrain"):
        return config.max_steps
    return int(read_config("pretrain", config.name).get("max_steps", config.max_steps))


def _build_module(config: PretrainConfig, spec: ModelSpec, seed: int, group: ProcessGroup) -> PretrainModule:
    encoder: Any = build_encoder(spec)
    decoder = build_decoder(config.decoder, encoder, config.spatial_dims) if config.decoder else None
    objectives = build_objectives(config, encoder, decoder, spec.in_channels)
    return PretrainModule(
        group.with_synced_batch_norm(encoder),
        decoder and group.with_synced_batch_norm(decoder),
        objectives,
        optimisation=config.optimisation,
        gradient_clip=config.gradient_clip,
        seed=seed,
        group=group,
        chunk=config.gradient_cache_chunk,
        compile_networks=config.compile,
    )


def _fit_batch_size(config: PretrainConfig, cohort: Cohort, group: ProcessGroup) -> PretrainConfig:
    n_train, n_val = (len({r.subject for r in cohort.records(part)}) for part in ("train", "val"))
    if n_train < max(2, group.count):
        raise _build_subject_error(n_train, n_train + n_val, group, cohort.index)
    if n_val < 2:
        log.warning("validation subjects: %d; without at least 2, there are no validation losses and no verdict", n_val)
    if n_train < config.batch_size:
        size = n_train // group.count * group.count
        log.warning("batch_size %d exceeds the %d training subjects; using %d", config.batch_size, n_train, size)
        return config.model_copy(update={"batch_size": size})
    return config


def _build_view_dataset(config: PretrainConfig, cohort: Cohort, records: tuple[ImageRecord, ...]) -> ViewDataset:
    views = config.views
    return ViewDataset(
        cohort.store,
        cohort.store_keys(records),
        shape=views.shape,
        count=views.count,
        same_crop=views.same_crop,
        augmentations=views.augmentations,
    )


def _build_train_loader(
    config: PretrainConfig,
    cohort: Cohort,
    records: tuple[ImageRecord, ...],
    *,
    seed: int,
    start: int,
    group: ProcessGroup,
) -> Any:
    subjects = [r.subject for r in records]
    size, steps = config.batch_size, config.max_steps
    sampler = StepSampler(subjects, batch_size=size, steps=steps, seed=seed, start=start, group=group)
    return step_loader(
        _build_view_dataset(config, cohort, records), sampler, workers=config.workers, prefetch=config.prefetch
    )


def _build_val_loader(config: PretrainConfig, cohort: Cohort, records: tuple[ImageRecord, ...], *, seed: int) -> Any:
    subjects = [r.subject for r in records]
    if len(set(subjects)) < 2:
        return None
    size = min(config.batch_size, len(set(subjects)))
    sampler = StepSampler(subjects, batch_size=size, steps=VAL_BATCHES, seed=seed + 1)
    return step_loader(_build_view_dataset(config, cohort, records), sampler, workers=0)


def _restore_selection(
    history: MetricHistory, module: PretrainModule, last_step: int, probe: OnlineProbe | None
) -> dict[str, Any]:
    """Load the weights of the selected step into the module, and return the summary of the selection."""
    assert history.selection is not None
    history.selection.restore(module, last_step)
    selection = history.selection.summary(last_step)
    selection["n_labels"] = probe.n_labels if probe and selection["criterion"] == "probe" else 0
    log.info("encoder of step %d of %d: %s", selection["step"], last_step, selection["reason"])
    return selection
