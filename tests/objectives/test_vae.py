"""The VAE's loss against its formula, its chance level, and what beta does to the summary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from medim.config import build_from_section
from medim.models.encoders.convnet import ConvNet
from medim.objectives import OBJECTIVES
from medim.objectives.vae import VAE, beta_vae, count_active_units, kl_from_normal
from medim.types import Features, UsageError, Views

SHAPES = [(8, 12), (8, 12, 6)]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def encoder_of(shape: tuple[int, ...]) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(2, len(shape), shape, channels=(4, 8), summary="mean_max", hidden=0, summary_channels=5)


def objective_of(shape: tuple[int, ...], **options: Any) -> VAE:
    torch.manual_seed(1)
    return VAE((4, 8), 5, 2, shape, **{"decoder_channels": (8, 8, 4), **options})


def views_of(shape: tuple[int, ...], batch: int = 6) -> Views:
    image = torch.randn(batch, 1, 2, *shape, generator=torch.Generator().manual_seed(2))
    return Views(image, torch.zeros(batch, 1, len(shape)))


def encode_of(encoder: nn.Module, views: Views, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(clean=encoder(views.image.flatten(0, 1)), generator=generator)


class Answer(nn.Module):
    """A decoder that answers with one image, whatever it is given."""

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()
        self._image = image

    def forward(self, code: torch.Tensor) -> torch.Tensor:
        return self._image.expand(len(code), *self._image.shape)


def test_the_divergence_is_the_closed_form_of_torch() -> None:
    mu, log_sigma = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = kl_divergence(Normal(mu, log_sigma.exp()), Normal(torch.zeros(5).double(), 1.0)).sum(dim=1)
    torch.testing.assert_close(kl_from_normal(mu, log_sigma), expected, rtol=1e-12, atol=0)
    assert not kl_from_normal(torch.zeros(2, 5), torch.zeros(2, 5)).any()


@every_shape
@pytest.mark.parametrize("beta", [0.0, 1.0, 7.0])
def test_the_loss_is_the_summed_error_plus_beta_nats_over_the_summed_variance(
    shape: tuple[int, ...], beta: float
) -> None:
    encoder, objective, views = encoder_of(shape), objective_of(shape, beta=beta), views_of(shape)
    encode = encode_of(encoder, views)
    term = objective(encode, views)["vae"]
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    last = encode.clean.maps[-1].flatten(2)
    log_sigma = objective.to_log_sigma(torch.cat([last.mean(2), last.amax(2)], dim=1))
    drawn = objective.decoder(encode.clean.summary + log_sigma.exp() * noise)
    total = torch.zeros(())
    for n in range(6):
        total = total + (drawn[n] - views.image[n, 0]).square().sum() / 6
        posterior = Normal(encode.clean.summary[n], log_sigma[n].exp())
        total = total + beta * kl_divergence(posterior, Normal(0.0, 1.0)).sum() / 6
    variance = sum(views.image[:, 0].flatten(1).var(dim=0).tolist())
    assert term.loss.item() == pytest.approx(total.item() / variance, rel=1e-5)


@every_shape
def test_gradients_reach_the_encoder_the_spread_and_the_decoder(shape: tuple[int, ...]) -> None:
    encoder, objective, views = encoder_of(shape), objective_of(shape), views_of(shape)
    objective(encode_of(encoder, views), views)["vae"].loss.backward()
    named = [*encoder.named_parameters(), *objective.named_parameters()]
    assert [name for name, p in named if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_noise_comes_from_the_steps_generator_alone() -> None:
    encoder, objective, views = encoder_of((8, 12)).eval(), objective_of((8, 12)).eval(), views_of((8, 12))
    losses = []
    for seed, other in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(other)
        losses.append(objective(encode_of(encoder, views, seed), views)["vae"].loss.item())
    assert losses[0] == losses[1] != losses[2]


@every_shape
def test_chance_is_what_a_decoder_of_the_mean_image_pays_that_knows_nothing_else(shape: tuple[int, ...]) -> None:
    """The decoder answers with the population's mean, the posterior is the prior: its mean loss is chance."""
    objective = objective_of(shape)
    mean = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    objective.decoder = Answer(mean)  # type: ignore[assignment]
    nn.init.zeros_(objective.to_log_sigma.weight), nn.init.zeros_(objective.to_log_sigma.bias)
    generator = torch.Generator().manual_seed(5)
    losses = []
    for _ in range(200):
        views = Views(mean + 3 * torch.randn(4, 1, 2, *shape, generator=generator), torch.zeros(4, 1, len(shape)))
        clean = Features((torch.zeros(4, 8, *shape),), torch.zeros(4, 5))
        term = objective(SimpleNamespace(clean=clean, generator=generator), views)["vae"]
        assert term.chance == 1.0
        losses.append(term.loss.item())
        assert term.diagnostics["kl"] == 0 == term.diagnostics["active_units"]
    assert sum(losses) / 200 == pytest.approx(1, abs=0.02)


def train(beta: float) -> tuple[float, float, float, float]:
    """Loss, KL, active units and error of a VAE on images of a bar at a random place; encoder trained."""
    encoder, objective = encoder_of((8, 12)), objective_of((8, 12), beta=beta)
    optimiser = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        image = torch.zeros(16, 1, 2, 8, 12)
        for n, column in enumerate(torch.randint(12, (16,), generator=generator).tolist()):
            image[n, ..., column] = 3.0
        views = Views(image, torch.zeros(16, 1, 2))
        clean = encoder(image.flatten(0, 1))
        term = objective(SimpleNamespace(clean=clean, generator=generator), views)["vae"]
        optimiser.zero_grad()
        term.loss.backward()
        optimiser.step()
    diagnostics = {name: value.item() for name, value in term.diagnostics.items()}
    return term.loss.item(), diagnostics["kl"], diagnostics["active_units"], diagnostics["error"]


def test_it_learns_what_differs_between_images_and_a_huge_beta_forbids_it() -> None:
    loss, kl, active, error = train(beta=1.0)
    assert loss < 0.7
    assert kl > 1
    assert active >= 1
    forbidden, kl_forbidden, active_forbidden, error_forbidden = train(beta=1e4)
    assert kl_forbidden < 0.01
    assert active_forbidden == 0
    assert error_forbidden > 1.5 * error
    assert forbidden > 0.9, "with nothing known of the image, the loss cannot be below chance"


def test_active_units_counts_entries_that_differ_between_images() -> None:
    mu = torch.zeros(10, 4)
    mu[:, 1], mu[:, 3] = torch.linspace(-1, 1, 10), torch.linspace(-0.05, 0.05, 10)
    assert count_active_units(mu + 5) == 1


def test_beta_vae_is_the_vae_with_a_beta_of_four() -> None:
    given: dict[str, Any] = {"channels": (4, 8), "summary_channels": 5, "in_channels": 2, "input_shape": (8, 12)}
    views, encoder = views_of((8, 12)), encoder_of((8, 12))
    losses = []
    for section in ({"name": "beta_vae"}, {"name": "vae", "beta": 4.0}, {"name": "vae"}):
        torch.manual_seed(0)
        objective = build_from_section(OBJECTIVES, {**section, "decoder_channels": [8, 4]}, **given)
        assert isinstance(objective, VAE)
        losses.append(objective(encode_of(encoder, views), views)["vae"].loss.item())
    assert losses[0] == losses[1] > losses[2]


def test_a_negative_beta_is_refused() -> None:
    with pytest.raises(UsageError, match=r"vae\.beta: expected 0 or more, got -1"):
        beta_vae((4,), 5, 1, (8, 8), beta=-1)
