"""AdamW with linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def optimiser(
    groups: Iterable[tuple[nn.Module, float]], *, lr: float, weight_decay: float, warmup_steps: int, max_steps: int
) -> tuple[AdamW, LambdaLR]:
    """Make optimiser and schedule.

    Args:
        groups: modules, each with its factor on `lr`.
        lr: peak learning rate.
        weight_decay: AdamW's decay (Loshchilov & Hutter 2019); vectors (norms, biases) are left out.
        warmup_steps: steps of linear rise from 0.
        max_steps: where the cosine reaches 0.
    """
    parameters = []
    for module, scale in groups:
        trained = [p for p in module.parameters() if p.requires_grad]
        for decay, members in (
            (weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if members:
                parameters.append({"params": members, "lr": lr * scale, "weight_decay": decay})

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))

    adamw = AdamW(parameters, lr=lr, fused=torch.cuda.is_available())
    return adamw, LambdaLR(adamw, factor)
