"""Norms, clipping and unscaling of the gradients of a step, and norm of the encoder weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


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


def unscale_fused_gradients(optimiser: Optimizer, scaler: Any) -> None:
    """Remove the loss scale from the gradients of a fused optimiser, so that they can be measured and clipped.

    Lightning and `GradScaler` unscale the gradients of other optimisers before the step, but leave those of a fused one
    to its kernel, which runs after the clipping. After this call, the kernel does not unscale them again.

    Args:
        optimiser: an optimiser of PyTorch.
        scaler: gradient scaler of the run (fp16), or None.
    """
    if scaler is not None and getattr(optimiser, "_step_supports_amp_scaling", False):
        scaler.unscale_(optimiser)


def clip_gradients(optimiser: Optimizer, largest: float) -> None:
    """Scale the unscaled gradients of an optimiser to a norm of at most `largest`; 0 disables clipping.

    The modules clip in `on_before_optimizer_step`; the clipping of Lightning rejects a fused optimiser in mixed
    precision.
    """
    if largest:
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], largest)


def weight_norm(encoder: nn.Module) -> dict[str, float]:
    """Compute `weight_norm`: Euclidean norm of the weights with weight decay (matrices and kernels)."""
    return {"weight_norm": float(nn.utils.get_total_norm([p.detach() for p in encoder.parameters() if p.ndim > 1]))}
