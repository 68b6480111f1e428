"""Assemble encoder, decoder and head to the model of a task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from medim.config import Section, build_from_section, validate_section
from medim.model_spec import NetworkSpec
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.types import Array, Features


class Model(nn.Module):
    """Chain of encoder, optional decoder and head: from images to logits."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module | None, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.head = head
        self._frozen_parts: tuple[nn.Module, ...] = ()

    def freeze(self, parts: Sequence[nn.Module]) -> None:
        """Freeze some parts: no gradients, and norms use and keep their stored statistics."""
        self._frozen_parts = tuple(parts)  # a tuple, so that the modules are not registered a second time
        for part in parts:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Model:
        """Set the training mode of all parts that are not frozen."""
        super().train(mode)
        for part in self._frozen_parts:
            part.eval()
        return self

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Compute the logits of (N, in_channels, ...) images; see the head for their shape."""
        return self.logits(self.encoder(image))

    def logits(self, features: Features) -> torch.Tensor:
        """Compute the logits from the features of the encoder."""
        logits: torch.Tensor = self.head(features if self.decoder is None else self.decoder(features))
        return logits


def as_numpy_function(module: nn.Module) -> Callable[[Array], Array]:
    """Wrap a module as a function of numpy arrays (N, C, ...), on the module's own device and without gradients.

    The output of an encoder is its summary.
    """
    device = next(module.parameters()).device

    def run_module(image: Array) -> Array:
        with torch.inference_mode():
            answer = module(torch.from_numpy(np.ascontiguousarray(image, np.float32)).to(device))
        output = answer.summary if isinstance(answer, Features) else answer
        return to_numpy(output)

    return run_module


def to_numpy(output: torch.Tensor) -> Array:
    """Copy an output to a numpy array; half precision becomes float32, and float64 stays.

    Examples:
        >>> to_numpy(torch.ones(1, dtype=torch.bfloat16)).dtype.name
        'float32'
    """
    return np.asarray(output.to(torch.promote_types(output.dtype, torch.float32)).cpu().numpy())


def build_encoder(spec: NetworkSpec) -> nn.Module:
    """Build an encoder with fresh weights.

    Args:
        spec: `encoder` (section of ENCODERS), `in_channels`, `spatial_dims`, `input_shape`.

    Examples:
        >>> section = {"name": "unet", "channels": [4, 8]}
        >>> spec = NetworkSpec(encoder=section, in_channels=1, spatial_dims=2, input_shape=(32, 32))
        >>> build_encoder(spec).strides
        (1, 2)
    """
    return build_from_section(
        ENCODERS,
        spec.encoder,
        in_channels=spec.in_channels,
        spatial_dims=spec.spatial_dims,
        input_shape=spec.input_shape,
        encoders=ENCODERS,
    )


def build_decoder(section: Section, encoder: Any, spatial_dims: int) -> nn.Module:
    """Build a decoder with fresh weights for the maps of an encoder."""
    return build_from_section(
        DECODERS, section, channels=encoder.channels, strides=encoder.strides, spatial_dims=spatial_dims
    )


def check_sections(spec: NetworkSpec) -> None:
    """Check the names and options of encoder, decoder and head, without building them.

    Raises:
        UsageError: see `medim.config.validate_section`.
    """
    validate_section(ENCODERS, spec.encoder, run_args=("in_channels", "spatial_dims", "input_shape", "encoders"))
    part_args = ("channels", "strides", "summary_channels", "spatial_dims", "out_channels")
    if spec.decoder is not None:
        validate_section(DECODERS, spec.decoder, run_args=part_args)
    if spec.head is not None:
        validate_section(HEADS, spec.head, run_args=part_args)


def build_model(spec: NetworkSpec) -> Model:
    """Build encoder, decoder and head with fresh weights.

    Args:
        spec: the keys that `build_encoder` needs, and `decoder` (section or None), `head` (section), `out_channels`.
    """
    encoder: Any = build_encoder(spec)
    decoder: Any = build_decoder(spec.decoder, encoder, spec.spatial_dims) if spec.decoder else None
    channels = (decoder.out_channels,) if decoder else encoder.channels
    head = build_from_section(
        HEADS,
        spec.head or {},
        channels=channels,
        summary_channels=encoder.summary_channels,
        spatial_dims=spec.spatial_dims,
        out_channels=spec.out_channels,
    )
    return Model(encoder, decoder, head)
