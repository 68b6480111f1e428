"""The optimiser and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Adam, AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import LambdaLR

from medim.config import OptimiserName, Schedule

OPTIMISERS: dict[OptimiserName, type[Optimizer]] = {"adamw": AdamW, "adam": Adam, "radam": RAdam}
DROP_FACTOR = 0.2  # what `steps` multiplies the rate with (AMDIM's)


def build_optimiser(
    groups: Iterable[tuple[nn.Module, float]],
    *,
    lr: float,
    weight_decay: float,
    warmup_steps: int,
    max_steps: int,
    optimiser: OptimiserName = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Schedule = "cosine",
    drop_at: Sequence[int] = (),
) -> tuple[Optimizer, LambdaLR]:
    """Make optimiser and schedule.

    Args:
        groups: modules, each with its factor on `lr`.
        lr: peak learning rate.
        weight_decay: decoupled in adamw (Loshchilov & Hutter 2019), added to the gradient in the others; vectors
            (norms, biases) are left out.
        warmup_steps: steps of linear rise from 0.
        max_steps: where the cosine reaches 0.
        optimiser: an entry of OPTIMISERS.
        betas: its decay rates of the gradient's moments.
        schedule: after the warm-up: a cosine to 0, constant, or constant but for a drop to a fifth at each of
            `drop_at`.
        drop_at: steps.
    """
    parameter_groups = []
    for module, scale in groups:
        trainable = [p for p in module.parameters() if p.requires_grad]
        for decay, members in (
            (weight_decay, [p for p in trainable if p.ndim > 1]),
            (0.0, [p for p in trainable if p.ndim <= 1]),
        ):
            if members:
                parameter_groups.append({"params": members, "lr": lr * scale, "weight_decay": decay})

    def compute_lr_factor(step: int) -> float:
        """The share of its peak that a rate has in a step, counted from 0."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))
        return float(DROP_FACTOR ** sum(step >= drop for drop in drop_at)) if schedule == "steps" else 1.0

    fused = {} if optimiser == "radam" else {"fused": torch.cuda.is_available()}
    options: dict[str, Any] = {"lr": lr, "betas": betas, **fused}
    optimiser_instance = OPTIMISERS[optimiser](parameter_groups, **options)
    return optimiser_instance, LambdaLR(optimiser_instance, compute_lr_factor)
