"""Each critic against its formula, and the options one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medim.models import critics
from medim.models.critics import Bilinear, ConcatAndConvolve, EncodeAndDot
from medim.types import UsageError


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
    plain, scaled = EncodeAndDot(64, 64), EncodeAndDot(64, 64, scale_scores=True)
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
    affine = EncodeAndDot(6, 5, width=8, local_norm="batch_affine").local.norm
    assert isinstance(affine, nn.BatchNorm1d)
    assert affine.affine


def test_the_summary_side_without_a_shortcut_is_two_linear_layers() -> None:
    side = EncodeAndDot(6, 5, width=8, summary_norm="none", summary_shortcut=False).summary.eval()
    first, norm, _, second = side.block
    x = torch.randn(3, 5, 1)
    hidden = torch.einsum("uc,bcl->bul", first.weight[..., 0], x) / (1 + norm.eps) ** 0.5
    torch.testing.assert_close(side(x), torch.einsum("uc,bcl->bul", second.weight[..., 0], hidden.relu()))


def repeated(critic: ConcatAndConvolve, local: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
    """The plain form: every pair's features side by side, through the whole of each layer."""
    shape = (len(summary), summary.shape[2], len(local), local.shape[2])
    locals_ = local.permute(0, 2, 1).expand(*shape, -1)
    summaries = summary.permute(0, 2, 1)[:, :, None, None].expand(*shape, -1)
    x = torch.cat([locals_, summaries], dim=-1)
    for layer in critic.hidden:
        x = layer(x).relu()
    return critic.score(x).squeeze(-1)


def some_pairs() -> torch.Tensor:
    return torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(3)) < 0.5


@pytest.mark.parametrize("at_once", [2**24, 8 * 5], ids=["one block", "blocks of five pairs"])
@pytest.mark.parametrize("pairs", [None, some_pairs()], ids=["all", "some"])
def test_concat_and_convolve_equals_the_form_with_repeated_features(
    pairs: torch.Tensor | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(critics, "_MAX_HIDDEN_UNITS", at_once)
    critic = ConcatAndConvolve(6, 5, hidden=(8, 7)).double()
    generator = torch.Generator().manual_seed(4)
    sides = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 6, 4), (2, 5, 2))]
    counted = torch.ones(2, 2, 3, 4, dtype=torch.bool) if pairs is None else pairs.expand(2, 2, 3, 4)
    found = []
    for form in (lambda *given: critic(*given, pairs), lambda *given: (repeated(critic, *given), None)):
        given = [side.clone().requires_grad_() for side in sides]
        critic.zero_grad()
        scores, square = form(*given)
        (scores[counted] * torch.arange(1.0, 1 + int(counted.sum()))).sum().backward()
        gradients = [x.grad for x in (*given, *critic.parameters())]
        found.append(
            (scores[counted].detach(), gradients, scores[counted].square().mean() if square is None else square)
        )
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_pairs_that_are_not_asked_for_cost_nothing() -> None:
    critic, seen = ConcatAndConvolve(6, 5, hidden=(8, 8)), []
    critic.hidden[1].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    local, summary = features()
    for pairs in (None, some_pairs(), torch.zeros(1, 1, 1, 1, dtype=torch.bool)):
        scores, square = critic(local, summary, pairs)
        assert scores.isfinite().all()
        assert square.isfinite()
    assert seen == [2 * 3 * 4, int(some_pairs().sum()), 0]


def test_a_network_without_hidden_layers_is_refused() -> None:
    with pytest.raises(UsageError, match=r"concat_and_convolve\.hidden: expected one or more widths above 0, got \[\]"):
        ConcatAndConvolve(6, 5, hidden=())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_bilinear_score_is_the_local_times_the_turned_summary(scaled: bool) -> None:
    critic = Bilinear(6, 5, scale_scores=scaled)
    local, summary = features()
    expected = torch.einsum("bcl,cs,asg->agbl", local, critic.weight.weight, summary) / (6**0.5 if scaled else 1)
    torch.testing.assert_close(critic(local, summary)[0], expected)


@pytest.mark.parametrize("make", [EncodeAndDot, ConcatAndConvolve, Bilinear])
def test_the_mean_square_is_that_of_the_pairs_before_clipping(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    plain = make(6, 5).eval()
    clipped = make(6, 5, clip=0.1).eval()  # type: ignore[call-arg]
    clipped.load_state_dict(plain.state_dict())
    pairs = some_pairs()
    (scores, square), (held, same) = plain(*features(), pairs), clipped(*features(), pairs)
    assert square.item() == pytest.approx(scores[pairs].square().mean().item(), rel=1e-5)
    assert same.item() == pytest.approx(square.item())
    torch.testing.assert_close(held[pairs], 0.1 * torch.tanh(scores[pairs] / 0.1))
