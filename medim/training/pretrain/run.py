"""Pretrain an encoder: index in, `RUN/encoder/` out."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from medim.config import PretrainConfig, apply_overrides, build_from_section, read_config
from medim.data.contamination import TrainingHistory
from medim.data.index.index import ImageRecord, Index
from medim.data.loading.augmentations import GEOMETRIC, Augmentation
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import ViewDataset
from medim.data.loading.splits import write_splits
from medim.files import json_sha256, prepare_output_folder, write_json
from medim.model_spec import SCHEMA_VERSION, ModelSpec, NetworkSpec
from medim.models.model import build_decoder, build_encoder
from medim.objectives import OBJECTIVES
from medim.objectives.objective import encoder_info
from medim.signals import handle_shutdown_signals
from medim.training.auto_config import resolve_run_config
from medim.training.engine.checkpoints import find_newest_checkpoint, get_resume_steps, list_corrupt_checkpoints
from medim.training.engine.gradient_cache import check_chunk_support
from medim.training.engine.gradients import weight_norm
from medim.training.engine.launch import launched, planned_group
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.training.engine.sampler import StepSampler, step_loader
from medim.training.engine.trainer import make_trainer, peak_memory, run_trainer
from medim.training.fit_ood import save_ood_detector
from medim.training.pretrain.checkpoint_selection import CheckpointSelection
from medim.training.pretrain.figures import draw_training_figures
from medim.training.pretrain.history import MetricHistory
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.online_probe import AlignmentMetric, OnlineProbe, open_probe
from medim.training.pretrain.save_encoder import write_encoder
from medim.training.pretrain.verdict import ADVICE
from medim.training.run_folder import write_config
from medim.training.tracking.tracking import check_target, log_encoder, log_results, track_run
from medim.types import UsageError, UserError
from medim.version import __version__, collect_versions

log = logging.getLogger(__name__)
HELD_OUT_BATCHES = 8


def resolve_pretrain_config(name: str, assignments: Sequence[str] = (), index: Index | None = None) -> PretrainConfig:
    """The pretraining configuration that fits an index.

    Args:
        name: preset or file.
        assignments: `key=value` overrides.
        index: the images that `auto` follows; None checks the configuration for images of the usual size.

    Raises:
        UsageError: see `medim.training.auto_config.resolve_run_config`.
    """
    config = resolve_run_config(
        "pretrain", apply_overrides(read_config("pretrain", name), assignments), index, where=name
    )
    assert isinstance(config, PretrainConfig)
    return config


@handle_shutdown_signals()
def pretrain(
    config: PretrainConfig,
    index: Index,
    out: Path,
    *,
    seed: int = 0,
    split_seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str = "auto",
    devices: int | None = None,
    nodes: int | None = None,
    stop_on_collapse: bool = False,
    store: Path | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, Any]:
    """Pretrain on the training split of an index and measure on its validation split.

    Args:
        config: what to run.
        index: the images; labels train nothing, they only probe the encoder on the way.
        out: the run's folder.
        seed: of weights, batches, crops, augmentation and objectives.
        split_seed: of the split by subject.
        resume: continue from the newest checkpoint in `out`.
        overwrite: empty `out` first.
        accelerator: Lightning's name of the device kind.
        devices: processes a node, one a device; None: as many as torchrun or SLURM started, else one.
        nodes: machines; None likewise.
        stop_on_collapse: end a run that has diverged or collapsed; its verdict says which.
        store: folder of preprocessed images; None is the user's cache.
        callbacks: who else watches, such as a stopwatch.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: too few subjects, a non-empty `out`, a device that is not there.
        UsageError: a section that cannot be built, or not be spread over the devices.
        StoppedError: SIGTERM or SIGUSR1 came; what was reached is saved.
    """
    start_time = time.perf_counter()
    plan = planned_group(accelerator, devices, nodes)
    dry_run_pretraining(config, plan)
    with launched(accelerator, plan) as ranks:
        flags = {"resume": resume, "stop_on_collapse": stop_on_collapse}
        seeds = {"seed": seed, "split_seed": split_seed}
        ranks.check_same(medim=__version__, config=config.hash, index=index.hash, **seeds, **flags)
        with ranks.main_process_first():
            if ranks.is_main:
                check_target(out if resume else None)
                prepare_output_folder(out, resume=resume, overwrite=overwrite)
            cohort = open_cohort(index, index.records, config.preprocessing, split_seed=split_seed, store=store)
        ranks.check_same(images=json_sha256(sorted(cohort.keys)))
        train, held_out = cohort.records("train"), cohort.records("val")
        config = _fit_batch_size(config, train, held_out, ranks)
        checkpoint, start = None, 0
        with ranks.main_process_first():
            if ranks.is_main:
                write_config(out, config, **seeds, index_hash=index.hash)
                write_splits(out / "split.csv", index, cohort.splits, train, seed=seed)
                checkpoint, start = find_newest_checkpoint(out / "checkpoints") if resume else (None, 0)
        checkpoint, start = ranks.broadcast((checkpoint, start))
        pl.seed_everything(seed, workers=False, verbose=False)
        spec = replace(cohort.build_spec(config, **seeds), decoder=config.decoder)
        module = _build_module(config, spec, seed, ranks)
        history, probe = _build_history(config, cohort, module, seed=seed, stop_on_collapse=stop_on_collapse)
        tracker_context = (
            track_run("pretrain", config, out, seed=seed, index_hash=index.hash)
            if ranks.is_main
            else nullcontext(False)
        )
        with tracker_context as logger:
            loader = _build_train_loader(config, cohort, train, seed=seed, start=start, ranks=ranks)
            held_out_loader = _build_held_out_loader(config, cohort, held_out, seed=seed)
            validate = held_out_loader is not None
            history.set_validation(held_out_loader, every=min(config.checkpoint_every_steps, config.max_steps))
            run_options: dict[str, Any] = {"logger": logger, "callbacks": [history, *callbacks], "validate": validate}
            trainer = make_trainer(config, out, accelerator=accelerator, ranks=ranks, **run_options)
            run_trainer(trainer, module, loader, held_out_loader, checkpoint=checkpoint)
            if validate and history.held_out_step != trainer.global_step:
                trainer.validate(module, held_out_loader, verbose=False)
            selection = _restore_selection(history, module, trainer.global_step, probe)
            summary = _build_pretrain_summary(config, cohort, history, module, trainer)
            summary |= {"selected": selection, "probe": _format_probe(probe, selection), "processes": ranks.count}
            if not isinstance(logger, bool):  # the first process alone has one, and writes
                write_encoder(out / "encoder", module, replace(spec, selected=selection), config.objectives)
                save_ood_detector(out / "encoder", module.encoder, cohort, spec)
                TrainingHistory().extended("pretrain", cohort.cases(train)).write(out / "encoder")
                history.write(out / "history.csv")
                summary["damaged_checkpoints"] = list_corrupt_checkpoints(out / "checkpoints")
                summary["seconds"] = time.perf_counter() - start_time
                write_json(out / "summary.json", summary)
                figures = draw_training_figures(out, config, history.rows)
                log_results(logger, summary, [out / "config.yaml", out / "summary.json", out / "history.csv", *figures])
                log_encoder(logger, config.name)
    return summary


def dry_run_pretraining(config: PretrainConfig, ranks: ProcessGroup = SINGLE_PROCESS) -> None:
    """Build every part for one blank image, so that a wrong section shows before an image is read or a file written.

    Raises:
        UsageError: a section does not fit its constructor, the encoder cannot take views of this shape, or batch or
            normalisation do not go with several processes.
    """
    ranks.check_batch(config.batch_size)
    if config.batch_size < 2:
        raise UsageError(
            f"batch_size: expected 2 or more, to tell images apart within a batch; got {config.batch_size}."
        )
    Augmentation(config.views.augmentations, spatial_dims=config.spatial_dims)
    shape = config.views.shape
    try:
        encoder: Any = build_encoder(
            NetworkSpec(
                encoder=config.encoder, in_channels=1, spatial_dims=config.spatial_dims, input_shape=tuple(shape)
            )
        )
        decoder = build_decoder(config.decoder, encoder, config.spatial_dims) if config.decoder else None
        build_objectives(config, encoder, decoder, 1)
        for network in (encoder, decoder):
            if network is not None:
                ranks.with_synced_batch_norm(network)
        check_chunk_support(config.encode_in_chunks_of, encoder, decoder)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"views.shape {list(shape)}: the encoder {config.encoder.get('name')!r} cannot take it ({error}). "
            "Choose larger views or fewer channels."
        ) from error


def _build_history(
    config: PretrainConfig, cohort: Cohort, module: PretrainModule, *, seed: int, stop_on_collapse: bool
) -> tuple[MetricHistory, OnlineProbe | None]:
    """Who watches the run, and measures it on held-out subjects."""
    train, held_out = cohort.records("train"), cohort.records("val")
    probe = open_probe(config, cohort, train, seed=seed)
    alignment_metrics = [AlignmentMetric(config, cohort, held_out, seed=seed)] if held_out else []
    history = MetricHistory(
        stop_on_collapse=stop_on_collapse,
        summary_trained=any(getattr(objective, "reads_summary", True) for objective in module.objectives.values()),
        encoder_metrics=[weight_norm, *alignment_metrics, *([probe] if probe else [])],
        selection=CheckpointSelection("probe" if probe else "held_out_loss"),
        weights=module.weights,
        first_norm=weight_norm(module.encoder)["weight_norm"],
    )
    return history, probe


def _build_module(config: PretrainConfig, spec: ModelSpec, seed: int, ranks: ProcessGroup) -> PretrainModule:
    encoder: Any = build_encoder(spec)
    decoder = build_decoder(config.decoder, encoder, config.spatial_dims) if config.decoder else None
    objectives = build_objectives(config, encoder, decoder, spec.in_channels)
    return PretrainModule(
        ranks.with_synced_batch_norm(encoder),
        decoder and ranks.with_synced_batch_norm(decoder),
        objectives,
        optimisation=config.optimisation,
        gradient_clip=config.gradient_clip,
        seed=seed,
        ranks=ranks,
        chunk=config.encode_in_chunks_of,
        compile_networks=config.compile,
    )


def build_objectives(
    config: PretrainConfig, encoder: Any, decoder: Any, in_channels: int
) -> dict[str, tuple[nn.Module, float]]:
    """Make the configured objectives, each with its weight, under its name (a second `x` is `x_2`).

    Args:
        config: the run.
        encoder: whose features they get.
        decoder: for those that decode; or None.
        in_channels: channels of an image.

    Raises:
        UsageError: a section does not fit its constructor.
    """
    views = config.views
    is_geometric = any(step["op"] in GEOMETRIC for step in views.augmentations)
    constructor_arguments = encoder_info(
        encoder, decoder, in_channels=in_channels, spatial_dims=config.spatial_dims, input_shape=views.shape
    ) | {"view_count": views.count, "aligned": views.count == 1 or (views.same_place and not is_geometric)}
    objectives: dict[str, tuple[nn.Module, float]] = {}
    counts: Counter[str] = Counter()
    for section in config.objectives:
        options = dict(section)
        weight = options.pop("weight", 1.0)
        if not isinstance(weight, int | float):
            raise UsageError(f"{options.get('name')}.weight: expected a number, got {weight!r}.")
        objective = build_from_section(OBJECTIVES, options, **constructor_arguments)
        name = str(options["name"])
        counts[name] += 1
        objectives[f"{name}_{counts[name]}" if counts[name] > 1 else name] = (objective, float(weight))
    return objectives


def _fit_batch_size(
    config: PretrainConfig, train: tuple[ImageRecord, ...], held_out: tuple[ImageRecord, ...], ranks: ProcessGroup
) -> PretrainConfig:
    subjects, others = (len({r.subject for r in records}) for records in (train, held_out))
    minimum = max(2, ranks.count)
    if subjects < minimum:
        raise UserError(
            f"pretraining: expected at least {minimum} subjects to train on, got {subjects}. "
            "Add images, or check the subject column of the index."
        )
    if others < 2:
        log.warning(
            "held-out subjects: %d; expected at least 2, so nothing is measured on them and no verdict possible", others
        )
    if subjects < config.batch_size:
        size = subjects // ranks.count * ranks.count
        log.warning("batch_size %d is more than the %d training subjects; using %d", config.batch_size, subjects, size)
        return config.model_copy(update={"batch_size": size})
    return config


def _build_view_dataset(config: PretrainConfig, cohort: Cohort, records: tuple[ImageRecord, ...]) -> ViewDataset:
    views = config.views
    return ViewDataset(
        cohort.store,
        cohort.store_keys(records),
        shape=views.shape,
        count=views.count,
        same_place=views.same_place,
        augmentations=views.augmentations,
    )


def _build_train_loader(
    config: PretrainConfig,
    cohort: Cohort,
    records: tuple[ImageRecord, ...],
    *,
    seed: int,
    start: int,
    ranks: ProcessGroup,
) -> Any:
    subjects = [r.subject for r in records]
    size, steps = config.batch_size, config.max_steps
    sampler = StepSampler(subjects, batch_size=size, steps=steps, seed=seed, start=start, ranks=ranks)
    return step_loader(
        _build_view_dataset(config, cohort, records), sampler, workers=config.workers, prefetch=config.prefetch
    )


def _build_held_out_loader(
    config: PretrainConfig, cohort: Cohort, records: tuple[ImageRecord, ...], *, seed: int
) -> Any:
    subjects = [r.subject for r in records]
    if len(set(subjects)) < 2:
        return None
    size = min(config.batch_size, len(set(subjects)))
    sampler = StepSampler(subjects, batch_size=size, steps=HELD_OUT_BATCHES, seed=seed + 1)
    return step_loader(_build_view_dataset(config, cohort, records), sampler, workers=0)


def _restore_selection(
    history: MetricHistory, module: PretrainModule, last_step: int, probe: OnlineProbe | None
) -> dict[str, Any]:
    """Put the chosen step's weights into the module; what is said of the choice."""
    assert history.selection is not None
    history.selection.restore(module, last_step)
    selection = history.selection.summary(last_step)
    selection["labels"] = probe.n_labels if probe and selection["by"] == "probe" else 0
    log.info("encoder of step %d of %d: %s", selection["step"], last_step, selection["why"])
    return selection


def _format_probe(probe: OnlineProbe | None, selection: dict[str, Any]) -> dict[str, Any] | None:
    """The online probe of the encoder that the run leaves; None where labels do not suffice."""
    value = selection["figures"].get("probe")
    return None if probe is None or value is None else {"value": value, **probe.protocol}


def _build_pretrain_summary(
    config: PretrainConfig, cohort: Cohort, history: MetricHistory, module: PretrainModule, trainer: pl.Trainer
) -> dict[str, Any]:
    report = history.compute_verdict()
    losses = {
        name: {
            "first": _replace_non_finite(history.curve(name)[0]),
            "last": _replace_non_finite(history.curve(name)[-1]),
            "held_out": _replace_non_finite(history.held_out[name][0]) if name in history.held_out else None,
        }
        for name in history.chance_levels()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "pretrain",
        "objectives": module.weights,
        "steps": trainer.global_step,
        "resumed_from_steps": get_resume_steps(trainer),
        "input_shape": list(config.views.shape),
        "loss": losses,
        "chance": history.chance_levels(),
        "diagnostics": history.diagnostics(),
        "verdict": report.verdict,
        "verdict_why": report.why,
        "what_to_try": ADVICE[report.verdict],
        "verdicts": [dict(zip(("step", "verdict", "why"), change, strict=True)) for change in history.verdict_changes],
        "rankme": _replace_non_finite(history.rankme),
        "feature_std": _replace_non_finite(history.feature_std),
        "alignment": _replace_non_finite(history.measures.get("alignment", math.nan)),
        "uniformity": _replace_non_finite(history.measures.get("uniformity", math.nan)),
        "seconds_per_step": history.seconds_per_step,
        "data_wait_fraction": history.data_wait_fraction,
        "peak_memory_bytes": peak_memory(),
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "config_hash": config.hash,
        "index_hash": cohort.index.hash,
        "overlap": cohort.overlap,
        "versions": collect_versions(),
    }


def _replace_non_finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
