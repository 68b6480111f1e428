"""Resolve the configuration of a pretraining run, build its objectives, and check it with a blank image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medim.config import PretrainConfig, apply_overrides, build_from_section, name_config, read_config
from medim.data.index.index import Index
from medim.data.loading.augmentations import GEOMETRIC, Augmentation
from medim.model_spec import NetworkSpec
from medim.models.model import build_decoder, build_encoder
from medim.objectives import OBJECTIVES
from medim.objectives.objective import Term, encoder_info
from medim.training.auto_config import resolve_run_config
from medim.training.engine.gradient_cache import check_chunk_support
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import UsageError, Views


def resolve_pretrain_config(name: str, assignments: Sequence[str] = (), index: Index | None = None) -> PretrainConfig:
    """Resolve a pretraining configuration for the images of an index.

    Args:
        name: preset or file.
        assignments: `key=value` overrides.
        index: images for the `auto` values; None checks the configuration for images of typical size.

    Raises:
        UsageError: see `medim.training.auto_config.resolve_run_config`.
    """
    config = resolve_run_config(
        "pretrain", apply_overrides(read_config("pretrain", name), assignments), index, where=name
    )
    assert isinstance(config, PretrainConfig)
    return config


def dry_run_pretraining(config: PretrainConfig, group: ProcessGroup = SINGLE_PROCESS) -> None:
    """Compute all losses of a batch of noise, to detect invalid sections before images are read or files are written.

    Raises:
        UsageError: the options of a section do not match its constructor, the encoder does not accept views of this
            shape, or batch size or normalisation do not work with several processes.
    """
    group.check_batch(config.batch_size)
    with name_config(config), torch.no_grad():
        if config.batch_size < 2:
            raise UsageError(
                "batch_size: expected 2 or more, because objectives compare images of a batch; "
                f"got {config.batch_size}."
            )
        Augmentation(config.views.augmentations, spatial_dims=config.spatial_dims)
        encoder, decoder, objectives = _build_networks(config)
        dry_run_losses(config, encoder, decoder, objectives)
    for network in (encoder, decoder):
        if network is not None:
            group.with_synced_batch_norm(network)


def _build_networks(config: PretrainConfig) -> tuple[Any, Any, dict[str, tuple[Any, float]]]:
    """Build encoder, decoder (or None) and objectives with their weights.

    Raises:
        UsageError: see `dry_run_pretraining`.
    """
    shape = config.views.shape
    try:
        encoder: Any = build_encoder(
            NetworkSpec(
                encoder=config.encoder, in_channels=1, spatial_dims=config.spatial_dims, input_shape=tuple(shape)
            )
        )
        decoder = build_decoder(config.decoder, encoder, config.spatial_dims) if config.decoder else None
        objectives = build_objectives(config, encoder, decoder, 1)
        check_chunk_support(config.gradient_cache_chunk, encoder, decoder)
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"views.shape {list(shape)}: not possible with the encoder {config.encoder.get('name')!r} ({error}). "
            "Use larger views or fewer channels."
        ) from error
    return encoder, decoder, objectives


def has_unused_parameters(config: PretrainConfig) -> bool:
    """Whether a backward pass of the run leaves a parameter without gradient, as CPC the summary network.

    Adversaries have a backward pass of their own, which leaves the encoder without gradient; with
    `gradient_cache_chunk`, so has the loss.
    """
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        encoder, decoder, objectives = _build_networks(config)
        networks = nn.ModuleList([encoder, *([decoder] if decoder else []), *(part for part, _ in objectives.values())])
        has_adversary = any(hasattr(objective, "adversary_parameters") for objective, _ in objectives.values())
        if has_adversary or config.gradient_cache_chunk:
            return True
        terms = dry_run_losses(config, encoder, decoder, objectives)
        loss = torch.stack([objectives[name][1] * term.loss for name, term in terms if objectives[name][1]]).sum()
        parameters = [parameter for parameter in networks.parameters() if parameter.requires_grad]
        return any(gradient is None for gradient in torch.autograd.grad(loss, parameters, allow_unused=True))


def dry_run_losses(
    config: PretrainConfig, encoder: nn.Module, decoder: nn.Module | None, objectives: Mapping[str, tuple[Any, float]]
) -> list[tuple[str, Term]]:
    """Compute each loss for two images of noise.

    Returns:
        Name of the objective and term, for each term.

    Raises:
        UsageError: an objective fails.
    """
    images = torch.randn(2, config.views.count, 1, *config.views.shape, generator=torch.Generator().manual_seed(0))
    views = Views(images, torch.zeros(2, config.views.count, config.spatial_dims))
    terms: list[tuple[str, Term]] = []
    for name, (objective, _) in objectives.items():
        try:
            encode = StepEncoder(encoder, decoder, views, torch.Generator().manual_seed(0))
            terms += [(name, term) for term in objective(encode, views).values()]
        except (RuntimeError, ValueError, IndexError) as error:
            raise UsageError(
                f"objective {name}: its loss cannot be computed for views.shape {list(config.views.shape)} "
                f"({error}). Change its options, or the views."
            ) from error
    return terms


def build_objectives(
    config: PretrainConfig, encoder: Any, decoder: Any, in_channels: int
) -> dict[str, tuple[nn.Module, float]]:
    """Build the configured objectives with their weights, by name (a second `x` is named `x_2`).

    Args:
        config: configuration of the run.
        encoder: encoder of the objectives.
        decoder: decoder for the objectives that need one, or None.
        in_channels: number of channels of an image.

    Raises:
        UsageError: the options of a section do not match its constructor, or no weight is above 0.
    """
    views = config.views
    is_geometric = any(step["op"] in GEOMETRIC for step in views.augmentations)
    is_aligned = views.count == 1 or (views.same_crop and not is_geometric)
    info = encoder_info(
        encoder, decoder, in_channels=in_channels, spatial_dims=config.spatial_dims, input_shape=views.shape
    )
    objectives: dict[str, tuple[nn.Module, float]] = {}
    counts: Counter[str] = Counter()
    for section in config.objectives:
        options = dict(section)
        weight = options.pop("weight", 1.0)
        if not isinstance(weight, int | float) or weight < 0:
            raise UsageError(f"{options.get('name')}.weight: expected a number of at least 0, got {weight!r}.")
        objective = build_from_section(OBJECTIVES, options, **info, view_count=views.count, aligned=is_aligned)
        name = str(options["name"])
        counts[name] += 1
        objectives[f"{name}_{counts[name]}" if counts[name] > 1 else name] = (objective, float(weight))
    if not any(weight for _, weight in objectives.values()):
        raise UsageError("objectives: expected an objective with a weight above 0, got weight 0 for all of them.")
    return objectives
