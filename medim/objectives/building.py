"""What every objective may ask of the encoder, decoder and views it is built for."""

from __future__ import annotations

from typing import Any

import torch


def known(
    encoder: Any, decoder: Any, *, in_channels: int, spatial_dims: int, input_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Constructor arguments for `build(OBJECTIVES, section, **known(...))`; each objective takes those it names.

    Args:
        encoder: whose features it gets; see `medim.models.encoders.Encoder`.
        decoder: for those that decode; or None.
        in_channels: channels of an image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of the views.
    """
    training = encoder.training
    with torch.no_grad():
        maps = encoder.eval()(torch.zeros(1, in_channels, *input_shape)).maps
    encoder.train(training)
    return {
        "channels": encoder.channels,
        "summary_channels": encoder.summary_channels,
        "spatial_dims": spatial_dims,
        "grids": tuple(tuple(m.shape[2:]) for m in maps),
        "in_channels": in_channels,
        "input_shape": input_shape,
        "decoded_channels": decoder.out_channels if decoder else 0,
        "receptive_fields": tuple(encoder.receptive_field(level) for level in range(len(maps))),
    }
