"""What is watched beside a contrast."""

from __future__ import annotations

import math

import pytest
import torch

from medim.objectives.contrastive_term import compute_spread


def test_spread_is_zero_for_equal_summaries_and_one_for_centred_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    assert compute_spread(torch.ones(8, 4)).item() == pytest.approx(0, abs=1e-6)
    assert compute_spread(torch.randn(4000, 4, generator=generator)).item() == pytest.approx(1, abs=0.05)
    assert compute_spread(5 + torch.randn(4000, 4, generator=generator)).item() == pytest.approx(
        1 / math.sqrt(26), abs=0.02
    )
    assert compute_spread(torch.zeros(8, 4)).item() == 0
