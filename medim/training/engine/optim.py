"""Optimiser and learning-rate schedule."""

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
DROP_FACTOR = 0.2  # factor of the learning rate at each milestone of the schedule `multistep`, as in AMDIM


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
    lr_milestones: Sequence[int] = (),
) -> tuple[Optimizer, LambdaLR]:
    """Build the optimiser and the learning-rate schedule.

    Args:
        groups: modules, each with the factor on `lr`.
        lr: peak learning rate.
        weight_decay: decoupled in adamw (Loshchilov & Hutter 2019), added to the gradient in the others; not applied to
            vectors (norms, biases).
        warmup_steps: number of steps of linear increase from 0.
        max_steps: step at which the cosine reaches 0.
        optimiser: an entry of OPTIMISERS.
        betas: decay rates of the moments of the gradient.
        schedule: schedule after the warm-up: cosine decay to 0, constant, or a drop to a fifth at each step of
            `lr_milestones`.
        lr_milestones: steps of the drops.
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
        """Compute the learning rate of a step, counted from 0, as a fraction of the peak."""
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))
        return float(DROP_FACTOR ** sum(step >= n for n in lr_milestones)) if schedule == "multistep" else 1.0

    fused = {} if optimiser == "radam" else {"fused": torch.cuda.is_available()}
    options: dict[str, Any] = {"lr": lr, "betas": betas, **fused}
    optimiser_instance = OPTIMISERS[optimiser](parameter_groups, **options)
    return optimiser_instance, LambdaLR(optimiser_instance, compute_lr_factor)
