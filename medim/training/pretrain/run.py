"""Pretrain an encoder: index in, `RUN/encoder/` out."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from medim.config import PretrainConfig, build, override, read
from medim.data.contamination import Seen
from medim.data.index.index import Index, Record
from medim.data.loading.augmentations import GEOMETRIC, Augmentation
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import ViewDataset
from medim.data.loading.splits import write_splits
from medim.files import fresh_folder, hash_of, write_json
from medim.models.model import build_decoder, build_encoder
from medim.models.serialization import SCHEMA_VERSION
from medim.objectives import OBJECTIVES
from medim.objectives.objective import known
from medim.signals import stoppable
from medim.training.auto_config import resolve
from medim.training.engine.checkpoints import damaged_checkpoints, newest_checkpoint, resumed_from
from medim.training.engine.gradient_cache import check_chunks
from medim.training.engine.gradients import weight_norm
from medim.training.engine.launch import planned, together
from medim.training.engine.process_group import ALONE, Ranks
from medim.training.engine.sampler import StepSampler, step_loader
from medim.training.engine.trainer import fit, make_trainer, peak_memory
from medim.training.fit_ood import write_reference
from medim.training.pretrain.checkpoint_selection import Selection
from medim.training.pretrain.figures import draw
from medim.training.pretrain.history import History
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.online_probe import OnlineProbe, Pairs, open_probe
from medim.training.pretrain.save_encoder import write_encoder
from medim.training.pretrain.verdict import ADVICE
from medim.training.run_folder import write_config
from medim.training.tracking.tracking import check_target, log_encoder, log_results, track
from medim.types import UsageError, UserError
from medim.version import __version__, versions

log = logging.getLogger(__name__)
HELD_OUT_BATCHES = 8


def resolve_config(name: str, assignments: Sequence[str] = (), index: Index | None = None) -> PretrainConfig:
    """The pretraining configuration that fits an index.

    Args:
        name: preset or file.
        assignments: `key=value` overrides.
        index: the images that `auto` follows; None checks the configuration for images of the usual size.

    Raises:
        UsageError: see `medim.training.auto_config.resolve`.
    """
    config = resolve("pretrain", override(read("pretrain", name), assignments), index, where=name)
    assert isinstance(config, PretrainConfig)
    return config


@stoppable()
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
    began = time.perf_counter()
    plan = planned(accelerator, devices, nodes)
    rehearse(config, plan)
    with together(accelerator, plan) as ranks:
        flags = {"resume": resume, "stop_on_collapse": stop_on_collapse}
        seeds = {"seed": seed, "split_seed": split_seed}
        ranks.check_same(medim=__version__, config=config.hash, index=index.hash, **seeds, **flags)
        ranks.first(check_target, out if resume else None)
        ranks.first(fresh_folder, out, resume=resume, overwrite=overwrite)
        steps = config.preprocessing
        cohort = ranks.in_turn(open_cohort, index, index.records, steps, split_seed=split_seed, store=store)
        ranks.check_same(images=hash_of(sorted(cohort.keys)))
        train, held_out = cohort.records("train"), cohort.records("val")
        config = _fitting(config, train, held_out, ranks)
        ranks.first(write_config, out, config, **seeds, index_hash=index.hash)
        ranks.first(write_splits, out / "split.csv", index, cohort.splits, train, seed=seed)
        pl.seed_everything(seed, workers=False, verbose=False)
        spec = {"kind": "encoder", **cohort.spec(config, **seeds), "decoder": config.decoder}
        module = _module(config, spec, seed, ranks)
        history, probe = _watch(config, cohort, module, seed=seed, stop_on_collapse=stop_on_collapse)
        checkpoint, start = ranks.told(newest_checkpoint, out / "checkpoints") if resume else (None, 0)
        opened = track("pretrain", config, out, seed=seed, index_hash=index.hash) if ranks.leads else nullcontext(False)
        with opened as logger:
            loader = _loader(config, cohort, train, seed=seed, start=start, ranks=ranks)
            held_out_loader = _held_out_loader(config, cohort, held_out, seed=seed)
            validate = held_out_loader is not None
            history.watch(held_out_loader, every=min(config.checkpoint_every_steps, config.max_steps))
            watching: dict[str, Any] = {"logger": logger, "callbacks": [history, *callbacks], "validate": validate}
            trainer = make_trainer(config, out, accelerator=accelerator, ranks=ranks, **watching)
            fit(trainer, module, loader, held_out_loader, checkpoint=checkpoint)
            if validate and history.held_out_step != trainer.global_step:
                trainer.validate(module, held_out_loader, verbose=False)
            chosen = _choose(history, module, trainer.global_step, probe)
            summary = _summary(config, cohort, history, module, trainer)
            summary |= {"selected": chosen, "probe": _probe(probe, chosen), "processes": ranks.count}
            if not isinstance(logger, bool):  # the first process alone has one, and writes
                write_encoder(out / "encoder", module, {**spec, "selected": chosen}, config.objectives)
                write_reference(out / "encoder", module.encoder, cohort, spec)
                Seen().then("pretrain", cohort.cases(train)).write(out / "encoder")
                history.write(out / "history.csv")
                summary["damaged_checkpoints"] = damaged_checkpoints(out / "checkpoints")
                summary["seconds"] = time.perf_counter() - began
                write_json(out / "summary.json", summary)
                figures = draw(out, config, history.rows)
                log_results(logger, summary, [out / "config.yaml", out / "summary.json", out / "history.csv", *figures])
                log_encoder(logger, config.name)
    return summary


def rehearse(config: PretrainConfig, ranks: Ranks = ALONE) -> None:
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
            {"encoder": config.encoder, "in_channels": 1, "spatial_dims": config.spatial_dims, "input_shape": shape}
        )
        decoder = build_decoder(config.decoder, encoder, config.spatial_dims) if config.decoder else None
        build_objectives(config, encoder, decoder, 1)
        for network in (encoder, decoder):
            if network is not None:
                ranks.synchronised(network)
        check_chunks(config.encode_in_chunks_of, encoder, decoder)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"views.shape {list(shape)}: the encoder {config.encoder.get('name')!r} cannot take it ({error}). "
            "Choose larger views or fewer channels."
        ) from error


def _watch(
    config: PretrainConfig, cohort: Cohort, module: PretrainModule, *, seed: int, stop_on_collapse: bool
) -> tuple[History, OnlineProbe | None]:
    """Who watches the run, and measures it on held-out subjects."""
    train, held_out = cohort.records("train"), cohort.records("val")
    probe = open_probe(config, cohort, train, seed=seed)
    pairs = [Pairs(config, cohort, held_out, seed=seed)] if held_out else []
    history = History(
        stop_on_collapse=stop_on_collapse,
        summary_trained=any(getattr(objective, "reads_summary", True) for objective in module.objectives.values()),
        gauges=[weight_norm, *pairs, *([probe] if probe else [])],
        selection=Selection("probe" if probe else "held_out_loss"),
        weights=module.weights,
        first_norm=weight_norm(module.encoder)["weight_norm"],
    )
    return history, probe


def _module(config: PretrainConfig, spec: dict[str, Any], seed: int, ranks: Ranks) -> PretrainModule:
    encoder: Any = build_encoder(spec)
    decoder = build_decoder(config.decoder, encoder, config.spatial_dims) if config.decoder else None
    objectives = build_objectives(config, encoder, decoder, int(spec["in_channels"]))
    return PretrainModule(
        ranks.synchronised(encoder),
        decoder and ranks.synchronised(decoder),
        objectives,
        optimisation=config.optimisation,
        gradient_clip=config.gradient_clip,
        seed=seed,
        ranks=ranks,
        chunk=config.encode_in_chunks_of,
        compiled=config.compile,
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
    moved = any(step["op"] in GEOMETRIC for step in views.augmentations)
    given = known(
        encoder, decoder, in_channels=in_channels, spatial_dims=config.spatial_dims, input_shape=views.shape
    ) | {"view_count": views.count, "aligned": views.count == 1 or (views.same_place and not moved)}
    objectives: dict[str, tuple[nn.Module, float]] = {}
    counts: Counter[str] = Counter()
    for section in config.objectives:
        options = dict(section)
        weight = options.pop("weight", 1.0)
        if not isinstance(weight, int | float):
            raise UsageError(f"{options.get('name')}.weight: expected a number, got {weight!r}.")
        objective = build(OBJECTIVES, options, **given)
        name = str(options["name"])
        counts[name] += 1
        objectives[f"{name}_{counts[name]}" if counts[name] > 1 else name] = (objective, float(weight))
    return objectives


def _fitting(
    config: PretrainConfig, train: tuple[Record, ...], held_out: tuple[Record, ...], ranks: Ranks
) -> PretrainConfig:
    subjects, others = (len({r.subject for r in records}) for records in (train, held_out))
    fewest = max(2, ranks.count)
    if subjects < fewest:
        raise UserError(
            f"pretraining: expected at least {fewest} subjects to train on, got {subjects}. "
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


def _dataset(config: PretrainConfig, cohort: Cohort, records: tuple[Record, ...]) -> ViewDataset:
    views = config.views
    return ViewDataset(
        cohort.store,
        cohort.store_keys(records),
        shape=views.shape,
        count=views.count,
        same_place=views.same_place,
        augmentations=views.augmentations,
    )


def _loader(
    config: PretrainConfig, cohort: Cohort, records: tuple[Record, ...], *, seed: int, start: int, ranks: Ranks
) -> Any:
    subjects = [r.subject for r in records]
    size, steps = config.batch_size, config.max_steps
    sampler = StepSampler(subjects, batch_size=size, steps=steps, seed=seed, start=start, ranks=ranks)
    return step_loader(_dataset(config, cohort, records), sampler, workers=config.workers, prefetch=config.prefetch)


def _held_out_loader(config: PretrainConfig, cohort: Cohort, records: tuple[Record, ...], *, seed: int) -> Any:
    subjects = [r.subject for r in records]
    if len(set(subjects)) < 2:
        return None
    size = min(config.batch_size, len(set(subjects)))
    sampler = StepSampler(subjects, batch_size=size, steps=HELD_OUT_BATCHES, seed=seed + 1)
    return step_loader(_dataset(config, cohort, records), sampler, workers=0)


def _choose(history: History, module: PretrainModule, last_step: int, probe: OnlineProbe | None) -> dict[str, Any]:
    """Put the chosen step's weights into the module; what is said of the choice."""
    assert history.selection is not None
    history.selection.restore(module, last_step)
    chosen = history.selection.told(last_step)
    chosen["labels"] = probe.labels if probe and chosen["by"] == "probe" else 0
    log.info("encoder of step %d of %d: %s", chosen["step"], last_step, chosen["why"])
    return chosen


def _probe(probe: OnlineProbe | None, chosen: dict[str, Any]) -> dict[str, Any] | None:
    """The online probe of the encoder that the run leaves; None where labels do not suffice."""
    value = chosen["figures"].get("probe")
    return None if probe is None or value is None else {"value": value, **probe.protocol}


def _summary(
    config: PretrainConfig, cohort: Cohort, history: History, module: PretrainModule, trainer: pl.Trainer
) -> dict[str, Any]:
    found = history.finding()
    losses = {
        name: {
            "first": _finite(history.curve(name)[0]),
            "last": _finite(history.curve(name)[-1]),
            "held_out": _finite(history.held_out[name][0]) if name in history.held_out else None,
        }
        for name in history.chance()
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "pretrain",
        "objectives": module.weights,
        "steps": trainer.global_step,
        "resumed_from_steps": resumed_from(trainer),
        "input_shape": list(config.views.shape),
        "loss": losses,
        "chance": history.chance(),
        "diagnostics": history.diagnostics(),
        "verdict": found.verdict,
        "verdict_why": found.why,
        "what_to_try": ADVICE[found.verdict],
        "verdicts": [dict(zip(("step", "verdict", "why"), said, strict=True)) for said in history.said],
        "rankme": _finite(history.rankme),
        "feature_std": _finite(history.feature_std),
        "alignment": _finite(history.measures.get("alignment", math.nan)),
        "uniformity": _finite(history.measures.get("uniformity", math.nan)),
        "seconds_per_step": history.seconds_per_step,
        "data_wait_fraction": history.data_wait_fraction,
        "peak_memory_bytes": peak_memory(),
        "device": str(trainer.strategy.root_device),
        "precision": str(trainer.precision),
        "config_hash": config.hash,
        "index_hash": cohort.index.hash,
        "overlap": cohort.overlap,
        "versions": versions(),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
