"""Networks that keep no activations: a batch goes through in chunks, and the backward pass computes each once more.

The loss sees the features of the whole batch at once, so the gradient is that of the whole batch: what gradient caching
(Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup") gives, by activation
checkpointing of each chunk (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"). Accumulating gradients
over small batches does not: each small batch would have its own negatives.
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
    """Run an encoder on images, or a decoder on features, some images at a time.

    Where a gradient is wanted, only the features are kept; the backward pass computes the activations of one chunk
    after the other again. The memory is that of all features and one chunk's activations, the time that of one more
    forward pass.

    Args:
        network: an encoder or a decoder, without statistics over the batch (see `check_chunk_support`).
        inputs: images (N, C, ...), or features of N images.
        size: images a chunk; N or more is plain activation checkpointing; None runs the network as it is.

    Returns:
        What the network makes of all N.
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
    # one output after the other, so that its parts are given back before the next is joined
    *maps, summary = [_join_tensors([chunk.pop(0) for chunk in outputs]) for _ in range(len(outputs[0]))]
    return Features(tuple(maps), summary)


def check_chunk_support(size: int | None, *networks: nn.Module | None) -> None:
    """Refuse chunks for a network whose output for an image depends on the others in its batch.

    Raises:
        UsageError: a network normalises over the batch; its statistics would be a chunk's, and its running statistics
            would count every chunk twice.
    """
    if size is None:
        return
    for network in networks:
        batch_norms = (
            [name for name, part in network.named_modules() if isinstance(part, _BatchNorm)] if network else []
        )
        if batch_norms:
            raise UsageError(
                f"encode_in_chunks_of: {size}: expected an encoder and a decoder without batch normalisation, whose "
                f"statistics would be those of a chunk; {type(network).__name__} has it ({batch_norms[0]}). "
                "Take norm: in or gn and no hidden layer before the summary, or leave encode_in_chunks_of out."
            )


def _has_dropout(network: Any) -> bool:
    """Whether a network draws random numbers, which the second pass must draw again."""
    return isinstance(network, nn.Module) and any(isinstance(part, _DropoutNd) for part in network.modules())


def _split_tensor(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    return tuple(tensor[start : start + size] for start in range(0, len(tensor), size))


def _join_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
