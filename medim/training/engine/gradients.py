"""How large the gradients of a step are, part by part, and the weights of the encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def gradient_norms(parts: Mapping[str, nn.Module | None], trainable: Iterable[nn.Parameter]) -> dict[str, torch.Tensor]:
    """Euclidean norm of each part's gradient, as it is now.

    Args:
        parts: name to module; a None is left out.
        trainable: the optimiser's parameters; others (an adversary's) count nowhere.

    Returns:
        Part to norm, a scalar on the gradient's device; a part without a gradient is left out.
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
    """`weight_norm`: Euclidean norm of the weights that decay, matrices and kernels."""
    return {"weight_norm": float(nn.utils.get_total_norm([p.detach() for p in encoder.parameters() if p.ndim > 1]))}
