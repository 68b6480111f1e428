from __future__ import annotations

import pytest
import torch

from medim.models.encoders import ResNet
from medim.types import UsageError


def test_a_deeper_net_has_the_grids_of_the_shallow_one_and_wider_fields() -> None:
    """No stride is lost with the number of blocks, as in the 37-layer net of the public code."""
    shallow = ResNet(1, 2, (32, 32), widths=(4, 4, 4), hidden=0)
    deep = ResNet(1, 2, (32, 32), widths=(4, 4, 4), blocks=(3, 4, 6), hidden=0)
    assert deep.strides == shallow.strides == (2, 2, 4, 4, 8, 8)
    assert [m.shape[-1] for m in deep(torch.zeros(2, 1, 32, 32)).maps] == [16, 16, 8, 8, 4, 4]
    assert deep.receptive_field(5) == 3 + 4 * 3 + 4 + 8 * 3 + 8 + 16 * 5


def test_a_stage_of_one_block_has_one_map() -> None:
    assert ResNet(1, 2, (16, 16), widths=(4, 4), blocks=(2, 1), hidden=0).strides == (2, 2, 4)


@pytest.mark.parametrize("blocks", [(2, 2), (2, 0, 2)])
def test_a_stage_without_blocks_is_refused(blocks: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"resnet\.blocks: expected 1 or more for each"):
        ResNet(1, 2, (16, 16), widths=(4, 4, 4), blocks=blocks)
