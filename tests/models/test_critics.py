"""Encode-and-dot against its formula, and its options one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medim.models.critics import EncodeAndDot


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 4, generator=generator), torch.randn(2, 5, 1, generator=generator)


def test_a_score_is_the_dot_product_of_two_embeddings() -> None:
    critic = EncodeAndDot(6, 5, width=8).eval()
    local, summary = features()
    u, v = critic.local(local).detach(), critic.summary(summary).detach()
    scores, square = critic(local, summary)
    for a in range(2):
        for b in range(3):
            for place in range(4):
                assert scores[a, 0, b, place].item() == pytest.approx(
                    float((u[b, :, place] * v[a, :, 0]).sum()), abs=1e-4
                )
    assert square.item() == pytest.approx(scores.square().mean().item(), rel=1e-5)


def test_an_embedding_is_a_residual_block_with_a_norm_over_channels() -> None:
    """dim-spec section 2: conv, BN, ReLU, conv plus a linear shortcut, then a layer norm at each location."""
    critic = EncodeAndDot(6, 5, width=8).eval()
    x, side = features()[0], critic.local
    first, norm, _, second = side.block
    hidden = torch.einsum("uc,bcl->bul", first.weight[..., 0], x) / (1 + norm.eps) ** 0.5
    out = torch.einsum("vu,bul->bvl", second.weight[..., 0], hidden.relu()) + second.bias[:, None]
    out = out + torch.einsum("uc,bcl->bul", side.shortcut.weight[..., 0], x)
    centred = out - out.mean(dim=1, keepdim=True)
    expected = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(side(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("channels", "width"), [(6, 8), (8, 8), (8, 6)])
def test_the_shortcut_starts_as_a_noisy_copy(channels: int, width: int) -> None:
    weight = EncodeAndDot(channels, 5, width=width).local.shortcut.weight[..., 0]
    torch.testing.assert_close(weight, torch.eye(width, channels), rtol=0, atol=0.01)


def test_the_papers_scores_are_large_and_scaled_ones_are_not() -> None:
    """Two normalised vectors of 2048 have dot products of a standard deviation of 45 (dim-spec, 7.4)."""
    local, summary = torch.randn(8, 64, 16), torch.randn(8, 64, 1)
    plain, scaled = EncodeAndDot(64, 64), EncodeAndDot(64, 64, scaled=True)
    scaled.load_state_dict(plain.state_dict())
    large, small = plain(local, summary)[0], scaled(local, summary)[0]
    assert 25 < large.std().item() < 70
    torch.testing.assert_close(small * 2048**0.5, large, rtol=1e-3, atol=1e-2)


def test_a_clip_bounds_the_scores_and_not_the_penalty() -> None:
    local, summary = features()
    plain, clipped = EncodeAndDot(6, 5, width=8).eval(), EncodeAndDot(6, 5, width=8, clip=2.0).eval()
    clipped.load_state_dict(plain.state_dict())
    scores, square = plain(local, summary)
    bounded, same_square = clipped(local, summary)
    torch.testing.assert_close(bounded, 2 * torch.tanh(scores / 2))
    assert torch.equal(square, same_square)
    assert bounded.abs().max() <= 2 < scores.abs().max()


def test_each_side_has_its_own_norm() -> None:
    critic = EncodeAndDot(6, 5, width=8, local_norm="none", summary_norm="batch")
    assert critic.local.norm is None
    assert isinstance(critic.summary.norm, nn.BatchNorm1d)
    assert isinstance(EncodeAndDot(6, 5, width=8).summary.norm, nn.LayerNorm)
