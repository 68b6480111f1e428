"""What every entry of CRITICS promises: a score a pair, in fp32, of that pair alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medim.config import build_from_section
from medim.models.critics import CRITICS
from medim.models.serialization import load_weights, save_model

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "encode_and_dot": [
        {"width": 16},
        {"width": 4, "local_norm": "none", "summary_norm": "none", "scale_scores": True, "clip": 2.0},
        {"width": 8, "local_norm": "batch", "summary_norm": "batch"},
    ],
    "concat_and_convolve": [{"hidden": [16, 8]}, {"hidden": [8], "clip": 2.0}],
    "bilinear": [{}, {"scale_scores": True, "clip": 2.0}],
}
GRIDS = {2: (3, 5), 3: (2, 3, 4)}
every_critic = pytest.mark.parametrize(
    ("section", "dims"),
    [
        pytest.param({"name": name, **options}, dims, id=f"{name}-{n}-{dims}d")
        for name in CRITICS
        for n, options in enumerate(VARIANTS.get(name, [{}]))
        for dims in (2, 3)
    ],
)


def make(section: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_from_section(CRITICS, section, channels=6, summary_channels=5)


def features(dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    local = torch.randn(4, 6, *GRIDS[dims], generator=generator).flatten(2)
    return local, torch.randn(3, 5, 2, generator=generator)


@every_critic
def test_every_summary_meets_every_location(section: dict[str, Any], dims: int) -> None:
    local, summary = features(dims)
    scores, square = make(section)(local, summary)
    assert scores.shape == (3, 2, 4, local.shape[2])
    assert square.shape == ()


@every_critic
def test_a_score_is_that_of_its_own_pair(section: dict[str, Any], dims: int) -> None:
    local, summary = features(dims)
    critic = make(section).eval()
    scores, _ = critic(local, summary)
    for a, g, b, place in [(0, 0, 0, 0), (2, 1, 3, 4), (1, 0, 2, local.shape[2] - 1)]:
        alone, _ = critic(local[b : b + 1, :, place : place + 1], summary[a : a + 1, :, g : g + 1])
        torch.testing.assert_close(scores[a, g, b, place], alone[0, 0, 0, 0], rtol=1e-4, atol=1e-4)


@every_critic
def test_scores_follow_the_order_of_batch_and_locations(section: dict[str, Any], dims: int) -> None:
    local, summary = features(dims)
    critic = make(section)
    images, places, others = torch.tensor([3, 1, 0, 2]), torch.randperm(local.shape[2]), torch.tensor([1, 2, 0])
    straight, _ = critic(local, summary)
    shuffled, _ = critic(local[images][:, :, places], summary[others])
    torch.testing.assert_close(shuffled, straight[others][:, :, images][..., places], rtol=1e-3, atol=1e-3)


@every_critic
def test_pairs_that_are_looked_at_score_the_same_as_among_all(section: dict[str, Any], dims: int) -> None:
    local, summary = features(dims)
    critic = make(section).eval()
    pairs = torch.rand(3, 1, 4, local.shape[2], generator=torch.Generator().manual_seed(3)) < 0.5
    everywhere = pairs.expand(3, 2, 4, local.shape[2])
    (scores, _), (some, square) = critic(local, summary), critic(local, summary, pairs)
    torch.testing.assert_close(some[everywhere], scores[everywhere])
    assert some.shape == scores.shape
    assert square.isfinite()


@every_critic
def test_scores_are_fp32_under_bf16_and_not_rounded_to_it(section: dict[str, Any], dims: int) -> None:
    local, summary = features(dims)
    critic = make(section)
    exact, _ = critic(local, summary)
    with torch.autocast("cpu", torch.bfloat16):
        scores, square = critic(local.bfloat16(), summary.bfloat16())
    assert scores.dtype == square.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())
    assert (scores - exact).norm() < 0.1 * exact.norm()


@every_critic
def test_gradients_reach_every_parameter_and_both_sides(section: dict[str, Any], dims: int) -> None:
    local, summary = features(dims)
    local.requires_grad_(), summary.requires_grad_()
    critic = make(section)
    scores, square = critic(local, summary)
    ((scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(2))).sum() + square).backward()
    inert = [n for n, p in critic.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not inert
    assert local.grad is not None
    assert local.grad.abs().sum() > 0
    assert summary.grad is not None
    assert summary.grad.abs().sum() > 0


@every_critic
def test_a_saved_critic_comes_back_bit_for_bit(section: dict[str, Any], dims: int, tmp_path: Path) -> None:
    local, summary = features(dims)
    critic = make(section)
    critic(local, summary)
    save_model(tmp_path, "critic", critic, {"kind": "critic"})
    again = build_from_section(CRITICS, section, channels=6, summary_channels=5)
    load_weights(again, tmp_path / "critic.safetensors")
    assert torch.equal(again.eval()(local, summary)[0], critic.eval()(local, summary)[0])
