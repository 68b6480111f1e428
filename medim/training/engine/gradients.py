"""Norms of the gradients of a step per part of the model, and norm of the encoder weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def gradient_norms(parts: Mapping[str, nn.Module | None], trainable: Iterable[nn.Parameter]) -> dict[str, torch.Tensor]:
    """Compute the Euclidean norm of the current gradient of each part.

    Args:
        parts: modules by name; parts that are None are left out.
        trainable: parameters of the optimiser; other parameters, such as those of an adversary, are not counted.

    Returns:
        Norm by part, a scalar on the device of the gradient; parts without a gradient are left out.
    """
    trainable_ids = {id(p) for p in trainable}
    norms = {}
    for name, module in parts.items():
        members = module.parameters() if module is not None else ()
        gradients = [p.grad.detach() for p in members if id(p) in trainable_ids and p.grad is not None]
        if gradients:
            norms[name] = nn.utils.get_total_norm(gradients)
    return norms


def weight_norm(encoder: nn.Module) -> dict[str, float]:
    """Compute `weight_norm`: Euclidean norm of the weights with weight decay (matrices and kernels)."""
    return {"weight_norm": float(nn.utils.get_total_norm([p.detach() for p in encoder.parameters() if p.ndim > 1]))}
