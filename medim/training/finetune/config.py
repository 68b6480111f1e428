"""Resolve the configuration of a fine-tuning run, and check it with a blank batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medim.config import (
    AUTO,
    FinetuneConfig,
    apply_overrides,
    list_presets,
    name_config,
    read_config,
    validate_section,
)
from medim.data.index.index import Index
from medim.data.loading.augmentations import Augmentation
from medim.inference.network import INFERENCES, run_inference
from medim.model_spec import NetworkSpec
from medim.models.decoders import MapShapeError, check_map_shapes
from medim.models.model import as_numpy_function, build_model
from medim.models.serialization import locate_weights
from medim.tasks import find_task
from medim.training.auto_config import resolve_run_config
from medim.training.finetune.targets import check_task_options, task_of_config
from medim.types import Modality, UsageError, UserError, Volume


def resolve_finetune_config(
    task: str,
    modality: Modality | None,
    encoder: Path | None,
    name: str | None,
    assignments: Sequence[str] = (),
    index: Index | None = None,
) -> FinetuneConfig:
    """Resolve a fine-tuning configuration for an encoder and an index.

    Without `name`, the preset is that which corresponds to the pretraining preset, or else that of the modality. The
    encoder determines the architecture, the preprocessing and, if the preset leaves it open, the shape of the views;
    for classification, the views are then whole images. A preset that only adds `centre` to the preprocessing of the
    encoder keeps its own.

    Args:
        task: segmentation, classification or regression; findings (several labels per image) are a classification.
        modality: modality; required without an encoder and `name`.
        encoder: pretraining run or package, or None.
        name: preset or file.
        assignments: `key=value` overrides.
        index: images for the `auto` values; None checks the configuration for images of typical size.

    Raises:
        UserError: the encoder is of another modality.
        UsageError: neither encoder, modality nor `name` is given; or see
            `medim.training.auto_config.resolve_run_config`.
    """
    find_task(task)
    if encoder is None and modality is None and name is None:
        raise UsageError("--modality: mri or xray is required without --encoder and --config.")
    spec = locate_weights(encoder)[1] if encoder else None
    if spec and modality and spec.modality != modality:
        raise UserError(
            f"--modality {modality}: the encoder {encoder} was pretrained on {spec.modality}. "
            "Omit --modality, or use another encoder."
        )
    preset_names = list_presets("finetune")
    twin = f"{spec.preset if spec else ''}-{task}"
    preset = name or (twin if twin in preset_names else f"{spec.modality if spec else modality}-{task}")
    preset = f"{preset}-{task}" if f"{preset}-{task}" in preset_names else preset
    content = read_config("finetune", preset)
    if content.get("task", task) != task:
        raise UserError(f"--config {preset}: this preset is for {content['task']}, but --task is {task}.")
    if spec:
        steps, shape = list(spec.preprocessing), list(spec.input_shape)
        preset_steps = content.get("preprocessing", [])
        if [step for step in preset_steps if step["op"] != "centre"] == steps:
            steps = preset_steps  # field of view for the task
        encoder_options = {"modality": spec.modality, "encoder": spec.encoder, "preprocessing": steps}
        views = {"shape": shape, **content.get("views", {})}
        if views["shape"] == AUTO and not find_task(task).whole_views:
            views["shape"] = shape
        content = {**content, **encoder_options, "views": views}
    config = resolve_run_config("finetune", apply_overrides(content, assignments), index, where=preset)
    assert isinstance(config, FinetuneConfig)
    check_task_options(config)
    return config


def dry_run_finetuning(config: FinetuneConfig, encoder: Path | None = None) -> None:
    """Run a blank batch through every part, to detect invalid sections before images are read or files are written.

    Args:
        config: configuration of the run.
        encoder: pretraining run or package, for the message about an encoder that the task cannot use; or None.

    Raises:
        UsageError: the options of a section do not match its constructor, or the parts are not compatible with each
            other or with the views.
    """
    with name_config(config):
        _dry_run_parts(config, encoder)


def _dry_run_parts(config: FinetuneConfig, encoder: Path | None) -> None:
    check_task_options(config)
    validate_section(INFERENCES, config.inference, key="mode", run_args=("run", "image"))
    Augmentation(config.views.augmentations, spatial_dims=config.spatial_dims)
    shape, count = config.views.shape, min(2, config.batch_size)
    weights = config.head.get("class_weights")  # one a class, whose number depends on the index
    spec = NetworkSpec(
        encoder=config.encoder,
        decoder=config.decoder,
        head=config.head,
        in_channels=1,
        out_channels=len(weights) if isinstance(weights, list | tuple) else 2,
        spatial_dims=config.spatial_dims,
        input_shape=tuple(shape),
    )
    try:
        model = build_model(spec)
        head: Any = model.head
        with torch.no_grad():
            encoder_part: Any = model.encoder
            if config.decoder and all(side % encoder_part.strides[-1] == 0 for side in shape):
                check_map_shapes(encoder_part(torch.zeros(count, 1, *shape)).maps, encoder_part.strides, shape)
            target = torch.tensor(task_of_config(config).make_blank_targets(count, shape))
            head.loss(model(torch.zeros(count, 1, *shape)), target)
        blank = Volume(np.zeros((1, *shape), np.float32), np.eye(4), np.eye(4), tuple(shape))
        run_inference(as_numpy_function(model.eval()), blank, config.inference)
    except MapShapeError as error:
        place = f"--encoder {encoder}" if encoder else f"config {config.name}"
        raise UsageError(f"{place}: {config.task} {error.requirement}") from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise UsageError(
            f"config {config.name}: encoder, decoder and head do not work together with views.shape {list(shape)} "
            f"and batch_size {config.batch_size} ({error}). Change one of these."
        ) from error
