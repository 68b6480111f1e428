from __future__ import annotations

import pytest
import torch

from medim.models.encoders import ConvNet, UNetEncoder
from medim.models.layers import use_channels_last


@pytest.mark.parametrize(("encoder", "dims"), [(ConvNet, 2), (UNetEncoder, 2), (UNetEncoder, 3)])
def test_channels_last_changes_the_layout_and_not_the_features(encoder: type[torch.nn.Module], dims: int) -> None:
    torch.manual_seed(0)
    extra = {"input_shape": (16, 16), "summary": "mean_max", "hidden": 0} if encoder is ConvNet else {}
    module = encoder(1, dims, channels=(4, 8), **extra).eval()
    image = torch.randn(2, 1, *[16] * dims)
    before = module(image)
    use_channels_last(module)
    after = module(image)
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    kernels = [weight for weight in module.parameters() if weight.ndim == dims + 2]
    assert kernels
    assert all(weight.is_contiguous(memory_format=layout) for weight in kernels)
    for one, other in zip(before.maps, after.maps, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
