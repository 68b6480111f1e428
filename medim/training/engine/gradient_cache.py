"""Gradient caching: encode a batch in chunks without keeping the activations, which the backward pass recomputes.

The loss is computed from the features of the whole batch, so the gradient is that of the whole batch. The result is
that of gradient caching (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"),
implemented by activation checkpointing per chunk (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
Accumulating gradients over small batches gives a different result, because each small batch has its own negatives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from medim.types import Features, UsageError

FeatureNetwork = Callable[[Any], Features]


def encode_in_chunks(network: FeatureNetwork, inputs: torch.Tensor | Features, size: int | None) -> Features:
    """Run an encoder on images, or a decoder on features, in chunks.

    With gradients enabled, only the features are kept; the backward pass recomputes the activations chunk by chunk. The
    memory is that of all features and of the activations of one chunk; the extra time is one forward pass.

    Args:
        network: encoder or decoder without batch statistics (see `check_chunk_support`).
        inputs: images (N, C, ...), or features of N images.
        size: images per chunk; N or more is plain activation checkpointing; None runs the network without chunks.

    Returns:
        Features of all N images.

    Examples:
        >>> from medim.models.encoders import UNetEncoder
        >>> encoder = UNetEncoder(1, 2, channels=(4, 8), summary_channels=16)
        >>> tuple(encode_in_chunks(encoder, torch.zeros(6, 1, 16, 16), size=2).summary.shape)
        (6, 16)
    """
    if size is None:
        return network(inputs)
    flat_inputs = (inputs,) if isinstance(inputs, torch.Tensor) else (*inputs.maps, inputs.summary)
    chunks = zip(*(_split_tensor(tensor, size) for tensor in flat_inputs), strict=True)
    preserve_rng = _has_dropout(network)

    def run_chunk(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = network(tensors[0] if isinstance(inputs, torch.Tensor) else Features(tensors[:-1], tensors[-1]))
        return (*output.maps, output.summary)

    if torch.is_grad_enabled():
        outputs = [
            [*checkpoint(run_chunk, *chunk, use_reentrant=False, preserve_rng_state=preserve_rng)] for chunk in chunks
        ]
    else:
        outputs = [[*run_chunk(*chunk)] for chunk in chunks]
    # join one output at a time, so that the memory of its parts is freed before the next is joined
    *maps, summary = [_join_tensors([chunk.pop(0) for chunk in outputs]) for _ in range(len(outputs[0]))]
    return Features(tuple(maps), summary)


def check_chunk_support(size: int | None, *networks: nn.Module | None) -> None:
    """Reject chunks for networks with batch normalisation.

    Raises:
        UsageError: a network has batch normalisation; the statistics would be those of a chunk, and the running
            statistics would count every chunk twice.
    """
    if size is None:
        return
    for network in networks:
        batch_norms = (
            [name for name, part in network.named_modules() if isinstance(part, _BatchNorm)] if network else []
        )
        if batch_norms:
            raise UsageError(
                f"gradient_cache_chunk: {size} does not work with batch normalisation, because its statistics would be "
                f"those of a chunk; {type(network).__name__} uses it ({batch_norms[0]}). "
                "Use norm: in or gn and no hidden layer before the summary, or remove gradient_cache_chunk."
            )


def _has_dropout(network: Any) -> bool:
    """Whether a network has dropout, so that the second pass must repeat its random numbers."""
    return isinstance(network, nn.Module) and any(isinstance(part, _DropoutNd) for part in network.modules())


def _split_tensor(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor[start : start + size] for start in range(0, len(tensor), size))


def _join_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
