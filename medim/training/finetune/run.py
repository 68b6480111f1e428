"""Fine-tune an encoder on few labels, or train its from-scratch twin by the very same schedule."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from medim.config import AUTO, FinetuneConfig, Section, bind, override, presets, read
from medim.data.contamination import Seen, guard, read_seen
from medim.data.index.index import Index, Record
from medim.data.loading.augmentations import Augmentation
from medim.data.loading.cohort import Cohort, open_cohort
from medim.data.loading.datasets import LabelledDataset
from medim.data.loading.splits import budget, write_splits
from medim.evaluation.cases import write_cases
from medim.evaluation.evaluate import validate
from medim.files import fresh_folder, write_csv, write_json
from medim.inference.network import INFERENCES
from medim.models.model import Model, as_run, build_model
from medim.models.serialization import SCHEMA_VERSION, find, load_weights, save
from medim.signals import stoppable
from medim.training.auto_config import resolve
from medim.training.engine.checkpoints import damaged_checkpoints, newest_checkpoint, resumed_from
from medim.training.engine.sampler import StepSampler, step_loader
from medim.training.engine.trainer import fit, make_trainer, peak_memory
from medim.training.finetune.head_init import start_head_as_probe
from medim.training.finetune.module import FinetuneModule, MeasureOnTheWay
from medim.training.finetune.targets import blank_target, targets_of, with_head_for
from medim.training.fit_ood import write_reference
from medim.training.pretrain.history import COLUMNS
from medim.training.run_folder import write_config
from medim.training.tracking.tracking import check_target, log_results, track
from medim.types import Modality, UsageError, UserError
from medim.version import versions

log = logging.getLogger(__name__)
PROBE_BATCHES = 32  # what the head is started from, where there are more
KINDS = {
    "segmentation": "segmenter",
    "classification": "classifier",
    "multi_label": "multi_label_classifier",
}  # by head


def resolve_config(
    task: str,
    modality: Modality | None,
    encoder: Path | None,
    name: str | None,
    assignments: Sequence[str] = (),
    index: Index | None = None,
) -> FinetuneConfig:
    """The fine-tuning configuration that fits an encoder and an index.

    Without `name`, the preset is the pretraining preset's twin, or else the modality's. The encoder decides
    architecture, preprocessing and, where the preset leaves it open, the views' shape; for classification the views
    are then whole images. A preset that only adds `centre` to the encoder's preprocessing keeps its own.

    Args:
        task: segmentation or classification.
        modality: needed where there is no encoder.
        encoder: a run or package, or None.
        name: preset or file.
        assignments: `key=value` overrides.
        index: the images that `auto` follows; None checks the configuration for images of the usual size.

    Raises:
        UserError: the encoder is of another modality.
        UsageError: neither encoder nor modality is given; or see `medim.training.auto_config.resolve`.
    """
    if encoder is None and modality is None:
        raise UsageError("--modality: expected mri or xray where no --encoder is given.")
    spec: Section = find(encoder)[1] if encoder else {}
    if spec and modality and spec["modality"] != modality:
        raise UserError(
            f"--modality {modality}: the encoder {encoder} was pretrained on {spec['modality']}. "
            "Leave --modality out, or choose another encoder."
        )
    known = presets("finetune")
    twin = f"{spec.get('preset', '')}-{task}"
    chosen = name or (twin if twin in known else f"{spec.get('modality', modality)}-{task}")
    chosen = f"{chosen}-{task}" if f"{chosen}-{task}" in known else chosen
    content = read("finetune", chosen)
    if content.get("task", task) != task:
        raise UserError(f"--config {chosen}: it is for {content['task']}, and --task says {task}.")
    if spec:
        given = {"modality": spec["modality"], "encoder": spec["encoder"], "preprocessing": spec["preprocessing"]}
        own = content.get("preprocessing", [])
        if [step for step in own if step["op"] != "centre"] == spec["preprocessing"]:
            given["preprocessing"] = own  # a field of view that the task asks for
        views = {"shape": spec["input_shape"], **content.get("views", {})}
        if views["shape"] == AUTO and task == "segmentation":
            views["shape"] = spec["input_shape"]
        content = {**content, **given, "views": views}
    config = resolve("finetune", override(content, assignments), index, where=chosen)
    assert isinstance(config, FinetuneConfig)
    return config


@stoppable()
def finetune(
    config: FinetuneConfig,
    index: Index,
    out: Path,
    *,
    encoder: Path | None = None,
    from_scratch: bool = False,
    labelled: int | None = None,
    label_fraction: float | None = None,
    seed: int = 0,
    subset_seed: int | None = None,
    split_seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    accelerator: str = "auto",
    store: Path | None = None,
    strict: bool = False,
    cohort: Cohort | None = None,
    parent_run: str | None = None,
    reference: bool = True,
) -> dict[str, Any]:
    """Fine-tune within a label budget and measure on the validation split.

    The schedule is fixed, so that nothing is chosen on any split.

    Args:
        config: what to run.
        index: the images, some of them labelled.
        out: the run's folder.
        encoder: a pretraining run or package whose weights (and decoder, where it has one) to start from; None starts
            fresh.
        from_scratch: take the encoder's architecture and preprocessing, not its weights.
        labelled: budget in images.
        label_fraction: budget as a share of the labelled training images.
        seed: of fresh weights, batches and augmentation.
        subset_seed: of the draw of the label budget; None takes `seed`.
        split_seed: of the split by subject.
        resume: continue from the newest checkpoint in `out`.
        overwrite: empty `out` first.
        accelerator: Lightning's name of the device kind.
        store: folder of preprocessed images; None is the user's cache.
        strict: refuse where the encoder, or the training split, holds an image or subject of the validation split.
        cohort: what `open_labelled` gave for this index, where several runs share it; `store` is then not looked at.
        parent_run: MLflow's id of the study that this run is a part of.
        reference: write what the out-of-distribution guard of a package needs, see `medim.training.fit_ood`.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: no labels for the task, weights that do not fit, a non-empty `out`, or `strict`.
        UsageError: a section that cannot be built, or parts that do not fit each other.
        StoppedError: SIGTERM or SIGUSR1 came; what was reached is saved.
    """
    began = time.perf_counter()
    config = with_head_for(config, index)
    rehearse(config)
    if parent_run is None:  # a study has asked
        check_target(out if resume else None)
    subset_seed = seed if subset_seed is None else subset_seed
    fresh_folder(out, resume=resume, overwrite=overwrite)
    cohort = cohort or open_labelled(config, index, split_seed=split_seed, store=store, strict=strict)
    train = budget(cohort.records("train"), labelled=labelled, fraction=label_fraction, seed=subset_seed)
    val = cohort.records("val")
    origin = read_seen(encoder) if encoder and not from_scratch else Seen()
    seen = guard(origin, cohort.cases(val), what=f"encoder {encoder}" if encoder else "fresh weights", strict=strict)
    pl.seed_everything(seed, workers=False, verbose=False)
    spec = spec_of(config, cohort, seed, split_seed)
    model, pretrained = _model(config, spec, None if from_scratch else encoder)
    made = {key: spec["provenance"][key] for key in ("seed", "split_seed", "index_hash", "parent")}
    budgeted = {"labelled": labelled, "label_fraction": label_fraction, "subset_seed": subset_seed}
    write_config(out, config, **made, **budgeted)
    write_splits(out / "split.csv", index, cohort.splits, cohort.records("train"), seed=subset_seed, used=train)
    checkpoint, start = newest_checkpoint(out / "checkpoints") if resume else (None, 0)
    if config.head_init == "probe" and not checkpoint:
        _start_head(config, cohort, train, model, spec, seed)
    module = FinetuneModule(model, config, pretrained)
    with track("finetune", config, out, seed=seed, index_hash=index.hash, parent=parent_run) as logger:
        on_the_way = MeasureOnTheWay(config.measure_at or (), out, index, val, spec)
        options: dict[str, Any] = {"accelerator": accelerator, "validate": False, "clip": config.gradient_clip}
        trainer = make_trainer(config, out, logger=False, callbacks=[on_the_way], **options)
        loader = loader_of(config, cohort, train, spec["classes"], steps=config.max_steps, seed=seed, start=start)
        fit(trainer, module, loader, checkpoint=checkpoint)
        save(out / "model", "model", model.eval(), spec)
        if reference:
            write_reference(out / "model", model, cohort, spec)
        write_csv(out / "history.csv", COLUMNS, module.rows)
        before = _unrecorded(encoder) if origin is None else origin
        before.then("finetune", cohort.cases(train)).write(out / "model")
        measured = _measure(model, index, val, spec, out / "cases.parquet")
        summary = _summary(config, cohort, module, spec, len(train), measured)
        summary["damaged_checkpoints"] = damaged_checkpoints(out / "checkpoints")
        summary |= {"overlap": cohort.overlap, "seen": seen}
        summary["seconds"] = time.perf_counter() - began
        write_json(out / "summary.json", summary)
        metrics = {f"val/{name}": m["value"] for name, m in measured["metrics"].items()} if measured else {}
        log_results(logger, summary | metrics, [out / "config.yaml", out / "summary.json", out / "history.csv"])
    return summary


def open_labelled(
    config: FinetuneConfig,
    index: Index,
    *,
    split_seed: int,
    store: Path | None = None,
    jobs: int = 1,
    strict: bool = False,
) -> Cohort:
    """The images of an index that carry what the task learns from; see `medim.data.loading.cohort.open_cohort`.

    Raises:
        UserError: there is none, or see there.
    """
    steps = config.preprocessing
    chosen = _labelled(config, index)
    return open_cohort(index, chosen, steps, split_seed=split_seed, store=store, jobs=jobs, strict=strict)


def rehearse(config: FinetuneConfig) -> None:
    """Put a blank batch through every part, so that a wrong one shows before an image is read or a file written.

    Raises:
        UsageError: a section does not fit its constructor, or the parts do not fit each other or the views.
    """
    bind(INFERENCES, config.inference, key="mode", given=("run", "image"))
    Augmentation(config.views.augmentations, spatial_dims=config.spatial_dims)
    shape, count = config.views.shape, min(2, config.batch_size)
    made = {"encoder": config.encoder, "decoder": config.decoder, "head": config.head, "out_channels": 2}
    try:
        model = build_model({**made, "in_channels": 1, "spatial_dims": config.spatial_dims, "input_shape": shape})
        head: Any = model.head
        with torch.no_grad():
            head.loss(model(torch.zeros(count, 1, *shape)), blank_target(config, count))
    except (RuntimeError, ValueError, IndexError) as error:
        raise UsageError(
            f"config {config.name}: expected encoder, decoder and head that fit each other, views.shape {list(shape)} "
            f"and batch_size {config.batch_size}, got an error from them ({error}). Change one of these."
        ) from error


def _labelled(config: FinetuneConfig, index: Index) -> list[Record]:
    """The images that carry what the task learns from."""
    if config.task == "segmentation":
        column, want = "mask", "a mask (an MSD folder, or --labels CSV with columns image,mask)"
    else:
        column, want = "label", "a label (--labels CSV)"
    found = [record for record in index.records if getattr(record, column) is not None]
    if not found:
        raise UserError(f"--task {config.task}: expected images with {want}, got {len(index.records)} images without.")
    if config.task == "classification" and len(index.labels) < 2:
        raise UserError(
            f"--task classification: expected labels of 2 or more classes, got {index.labels[0]!r} alone. "
            "Add images of another class, or check the label column."
        )
    return found


def _measure(
    model: Model, index: Index, val: Sequence[Record], spec: dict[str, Any], cases: Path
) -> dict[str, Any] | None:
    """Measure on the validation split and write the cases down; None where there is no image to measure on."""
    log.info("measuring on %d validation images", len(val))
    measured, rows = validate(as_run(model), index, val, spec) if val else (None, [])
    write_cases(cases, rows, spec["kind"])
    return measured


def _summary(
    config: FinetuneConfig,
    cohort: Cohort,
    module: FinetuneModule,
    spec: dict[str, Any],
    labelled: int,
    measured: dict[str, Any] | None,
) -> dict[str, Any]:
    losses = [loss for _, _, loss, _, _ in module.rows if loss is not None]
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "finetune",
        "task": config.task,
        "init": "pretrained" if spec["provenance"]["parent"] else "scratch",
        "labelled": labelled,
        "unlabelled_left_out": len(cohort.index.records) - len(cohort.keys) - len(cohort.rejected),
        "steps": module.global_step,
        "resumed_from_steps": resumed_from(module.trainer),
        "loss": {"first": losses[0], "last": losses[-1]},
        "val": measured,
        "peak_memory_bytes": peak_memory(),
        "device": str(module.device),
        "precision": str(module.trainer.precision),
        "config_hash": config.hash,
        "index_hash": cohort.index.hash,
        "versions": versions(),
    }


def _model(config: FinetuneConfig, spec: dict[str, Any], encoder: Path | None) -> tuple[Model, list[torch.nn.Module]]:
    """Build the model, start it from an encoder, which `spec` then names as its parent, and freeze what is to stay.

    Returns:
        The model, and its pretrained parts.
    """
    model = build_model(spec)
    pretrained: list[torch.nn.Module] = []
    if encoder:
        spec["provenance"]["parent"], pretrained = _load_pretrained(model, encoder)
    if config.pretrained_lr_scale == 0:
        model.freeze(pretrained)
    return model, pretrained


def _load_pretrained(model: Model, encoder: Path) -> tuple[str, list[torch.nn.Module]]:
    """Load an encoder's weights, and its decoder's where both sides have one.

    Returns:
        The encoder's sha256, and the parts of the model that were loaded.
    """
    weights, spec = find(encoder)
    if spec["kind"] != "encoder":
        load_weights(model.encoder, weights, prefix="encoder.")
        return str(spec["sha256"]), [model.encoder]
    load_weights(model.encoder, weights)
    decoder = weights.with_name("decoder.safetensors")
    if model.decoder is None or not decoder.is_file():
        return str(spec["sha256"]), [model.encoder]
    load_weights(model.decoder, decoder)
    return str(spec["sha256"]), [model.encoder, model.decoder]


def _unrecorded(encoder: Path | None) -> Seen:
    """What is to be said of weights that carry no record of what they have seen."""
    pretrained = encoder is None or find(encoder)[1]["kind"] == "encoder"
    return Seen(unknown=("pretrain",) if pretrained else ("pretrain", "finetune"))


def _start_head(
    config: FinetuneConfig,
    cohort: Cohort,
    records: Sequence[Record],
    model: Model,
    spec: dict[str, Any],
    seed: int,
) -> None:
    """Start the head as a probe of every labelled image, or of `PROBE_BATCHES` batches, unaugmented."""
    once = min(PROBE_BATCHES, -(-len(records) // config.batch_size))
    batches = loader_of(config, cohort, records, spec["classes"], steps=once, seed=seed, augment=False)
    start_head_as_probe(model, batches, classes=spec["out_channels"], seed=seed)


def loader_of(
    config: FinetuneConfig,
    cohort: Cohort,
    records: Sequence[Record],
    classes: Sequence[str],
    *,
    steps: int,
    seed: int,
    start: int = 0,
    augment: bool = True,
) -> Any:
    """Batches of labelled images (N, C, ...) and targets, one a step from `start` on."""
    dataset = LabelledDataset(
        cohort.store,
        cohort.store_keys(records),
        targets=targets_of(config, records, classes),
        shape=config.views.shape,
        augmentations=config.views.augmentations if augment else (),
    )
    images = [r.image for r in records]  # every labelled image counts, also two of one subject
    sampler = StepSampler(images, batch_size=config.batch_size, steps=steps, seed=seed, start=start)
    return step_loader(dataset, sampler, workers=config.workers, prefetch=config.prefetch)


def spec_of(config: FinetuneConfig, cohort: Cohort, seed: int, split_seed: int) -> dict[str, Any]:
    """The spec of the model that a run trains; see `medim.models.serialization`."""
    classes = list(cohort.index.classes if config.task == "segmentation" else cohort.index.labels)
    return {
        "kind": KINDS.get(config.head["name"], KINDS[config.task]),
        **cohort.spec(config, seed=seed, split_seed=split_seed),
        "decoder": config.decoder,
        "head": config.head,
        "out_channels": len(classes) + (config.task == "segmentation"),
        "inference": config.inference,
        "classes": classes,
    }
