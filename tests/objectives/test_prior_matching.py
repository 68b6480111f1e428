"""The adversary and the encoder pull apart: each step moves its own side, in its own direction."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from medim.objectives.prior_matching import PriorMatching
from medim.types import Features, Views

NO_VIEWS = Views(torch.zeros(0), torch.zeros(0))


def encode_of(summary: torch.Tensor, seed: int = 0) -> Any:
    return SimpleNamespace(clean=Features((), summary), generator=torch.Generator().manual_seed(seed))


def objective_of(**options: Any) -> PriorMatching:
    torch.manual_seed(0)
    return PriorMatching(4, **{"hidden": (32, 16), **options})


def linear(weight: list[float], bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weight]))
        layer.bias.fill_(bias)
    return layer


def test_the_encoders_loss_is_the_non_saturating_one_on_the_sigmoid() -> None:
    objective = objective_of()
    summary = torch.randn(7, 4)
    expected = softplus(-objective.discriminator(torch.sigmoid(summary))).mean()
    term = objective(encode_of(summary), NO_VIEWS)["prior_matching"]
    torch.testing.assert_close(term.loss, expected)
    assert term.chance is None
    gaussian = objective_of(prior="gaussian")
    torch.testing.assert_close(
        gaussian(encode_of(summary), NO_VIEWS)["prior_matching"].loss, softplus(-gaussian.discriminator(summary)).mean()
    )


def test_a_step_on_the_encoders_loss_lowers_it_and_raises_d() -> None:
    objective = objective_of()
    summary = nn.Parameter(torch.randn(32, 4))
    optimiser = torch.optim.SGD([summary], lr=1.0)
    losses, scores = [], []
    for _ in range(20):
        loss = objective(encode_of(summary), NO_VIEWS)["prior_matching"].loss
        losses.append(loss.item())
        scores.append(objective.discriminator(torch.sigmoid(summary)).mean().item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses == sorted(losses, reverse=True)
    assert scores == sorted(scores)
    assert losses[-1] < losses[0]


def test_the_encoders_step_leaves_no_gradient_in_the_discriminator() -> None:
    objective = objective_of()
    summary = torch.randn(8, 4, requires_grad=True)
    objective(encode_of(summary), NO_VIEWS)["prior_matching"].loss.backward()
    assert summary.grad is not None
    assert summary.grad.abs().sum() > 0
    assert all(p.grad is None for p in objective.discriminator.parameters())
    assert all(p.requires_grad for p in objective.discriminator.parameters()), "and it can learn again"


def test_the_discriminators_step_leaves_no_gradient_in_the_encoder() -> None:
    objective = objective_of()
    summary = torch.randn(8, 4, requires_grad=True)
    objective.adversary_loss(encode_of(summary), NO_VIEWS).backward()
    assert summary.grad is None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.adversary_parameters())
    assert sum(p.grad.abs().sum() for p in objective.adversary_parameters() if p.grad is not None) > 0


def test_the_adversary_is_the_whole_discriminator_and_nothing_else() -> None:
    objective = objective_of()
    held = {id(p) for p in objective.adversary_parameters()}
    assert held == {id(p) for p in objective.parameters()}


@pytest.mark.parametrize("prior", ["uniform", "gaussian"])
def test_the_gradient_penalty_of_a_linear_discriminator_is_its_squared_norm(prior: str) -> None:
    """A sample, whatever the batch: the DIM authors' code penalises the last sample only (dim-spec, 7.5)."""
    weight = [3.0, -1.0, 2.0, 0.5]
    for batch in (2, 7):
        free, held = (objective_of(gradient_penalty=factor, prior=prior) for factor in (0.0, 0.3))
        free.discriminator = held.discriminator = linear(weight)  # type: ignore[assignment]
        summary = torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch))
        losses = [o.adversary_loss(encode_of(summary), NO_VIEWS).item() for o in (free, held)]
        assert losses[1] - losses[0] == pytest.approx(0.3 * sum(w * w for w in weight), rel=1e-4)


def test_the_discriminators_loss_compares_samples_of_the_prior_with_squashed_summaries() -> None:
    objective = objective_of(gradient_penalty=0.0)
    summary = torch.randn(64, 4)
    real = torch.rand(64, 4, generator=torch.Generator().manual_seed(5))
    expected = (
        softplus(-objective.discriminator(real)).mean()
        + softplus(objective.discriminator(torch.sigmoid(summary))).mean()
    )
    torch.testing.assert_close(objective.adversary_loss(encode_of(summary, seed=5), NO_VIEWS), expected)


@pytest.mark.parametrize(("prior", "mean", "std"), [("uniform", 0.5, math.sqrt(1 / 12)), ("gaussian", 0.0, 1.0)])
def test_the_prior_has_the_moments_of_its_name(prior: str, mean: float, std: float) -> None:
    objective = objective_of(prior=prior)
    seen: list[torch.Tensor] = []
    objective.discriminator.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    objective.adversary_loss(encode_of(torch.zeros(20_000, 4)), NO_VIEWS)
    assert seen[0].mean().item() == pytest.approx(mean, abs=0.01)
    assert seen[0].std().item() == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize("prior", ["uniform", "gaussian"])
def test_the_game_moves_the_summaries_towards_the_prior(prior: str) -> None:
    torch.manual_seed(1)
    objective = objective_of(prior=prior, gradient_penalty=0.1)
    code = nn.Linear(4, 4)
    with torch.no_grad():
        code.bias.fill_(4.0)  # far to one side of either prior
    ours = torch.optim.Adam(code.parameters(), lr=0.02)
    theirs = torch.optim.Adam(objective.adversary_parameters(), lr=0.01, betas=(0.5, 0.999))
    generator = torch.Generator().manual_seed(2)
    for _ in range(150):
        encode = encode_of(code(torch.randn(64, 4, generator=generator)))
        encode.generator = generator
        for loss_of, optimiser in (
            (lambda e: objective.adversary_loss(e, NO_VIEWS), theirs),
            (lambda e: objective(e, NO_VIEWS)["prior_matching"].loss, ours),
        ):
            optimiser.zero_grad()
            loss_of(encode).backward()
            optimiser.step()
    summary = code(torch.randn(512, 4, generator=generator)).detach()
    placed = torch.sigmoid(summary) if prior == "uniform" else summary
    centre = 0.5 if prior == "uniform" else 0.0
    start = abs((torch.sigmoid(torch.tensor(4.0)) if prior == "uniform" else torch.tensor(4.0)) - centre)
    assert (placed.mean(dim=0) - centre).abs().mean() < 0.35 * start
