"""DIM(L): which summary meets which map, what occlusion hides from whom, and what a critic can learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from medim.models.encoders import ConvNet, UNetEncoder
from medim.objectives.infomax import LocalDIM, spread
from medim.objectives.mutual_information import infonce
from medim.types import Features, UsageError, Views

CRITIC = {"name": "encode_and_dot", "width": 8}


class Recorder:
    """An `Encode` that keeps the images it was given beside the clean ones."""

    def __init__(self, encoder: nn.Module, views: Views, seed: int = 0) -> None:
        self._encoder = encoder
        self.clean: Features = encoder(views.image.flatten(0, 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: list[torch.Tensor] = []

    def __call__(self, image: torch.Tensor) -> Features:
        self.seen.append(image)
        features: Features = self._encoder(image)
        return features

    def decode(self, features: Features) -> torch.Tensor:
        raise AssertionError("DIM decodes nothing")


def encoder_of(dims: int = 2) -> UNetEncoder:
    torch.manual_seed(0)
    return UNetEncoder(1, dims, channels=(4, 8), summary_channels=6)


def views_of(count: int = 1, batch: int = 4, shape: tuple[int, ...] = (12, 16)) -> Views:
    image = torch.randn(batch, count, 1, *shape, generator=torch.Generator().manual_seed(1))
    return Views(image, torch.zeros(batch, count, len(shape)))


def objective_of(encoder: Any, shape: tuple[int, ...] = (12, 16), **options: Any) -> LocalDIM:
    torch.manual_seed(2)
    options = {"critic": CRITIC, **options}
    return LocalDIM(encoder.channels, encoder.summary_channels, shape, **options).eval()


def test_with_one_view_the_loss_is_the_cross_entropy_of_the_views_own_scores() -> None:
    encoder, views = encoder_of(), views_of()
    objective = objective_of(encoder, estimator="infonce")
    encode = Recorder(encoder, views)
    scores, _ = objective.critic(encode.clean.maps[1].flatten(2), encode.clean.summary.unsqueeze(-1))
    term = objective(encode, views)["local_dim"]
    assert term.chance == pytest.approx(math.log(1 + 3 * 6 * 8))
    assert term.loss.item() == pytest.approx(term.chance - infonce(scores).item())
    assert term.diagnostics["bound"].item() == pytest.approx(infonce(scores).item())
    assert encode.seen == [], "the clean features serve"


def test_with_two_views_the_summary_of_each_meets_the_map_of_the_other() -> None:
    encoder, views = encoder_of(), views_of(count=2)
    objective = objective_of(encoder, estimator="infonce")
    one, two = encoder(views.image[:, 0]), encoder(views.image[:, 1])
    bounds = [
        infonce(objective.critic(local.maps[1].flatten(2), summary.summary.unsqueeze(-1))[0]).item()
        for summary, local in ((one, two), (two, one))
    ]
    term = objective(Recorder(encoder, views), views)["local_dim"]
    assert term.diagnostics["bound"].item() == pytest.approx(sum(bounds) / 2, rel=1e-4)


@pytest.mark.parametrize(("level", "locations"), [(0, 12 * 16), (1, 6 * 8), (-1, 6 * 8)])
def test_the_level_chooses_the_map_of_the_locals(level: int, locations: int) -> None:
    encoder, views = encoder_of(), views_of()
    term = objective_of(encoder, estimator="infonce", level=level)(Recorder(encoder, views), views)["local_dim"]
    assert term.chance == pytest.approx(math.log(1 + 3 * locations))


def test_a_level_the_encoder_has_not_is_refused() -> None:
    for level in (2, -3):
        with pytest.raises(UsageError, match=rf"local_dim\.level: expected 0 to 1, or -1 to -2.*got {level}"):
            objective_of(encoder_of(), level=level)


@pytest.mark.parametrize("dims", [2, 3])
def test_occlusion_hides_from_the_summary_and_from_nothing_else(dims: int) -> None:
    shape = (12, 16, 8)[:dims]
    encoder, views = encoder_of(dims).eval(), views_of(shape=shape)
    plain, occluded = (objective_of(encoder, shape, occlusion=size) for size in (0, 4))
    met: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, objective in (("plain", plain), ("occluded", occluded)):
        objective.critic.register_forward_pre_hook(lambda _, args, name=name: met.update({name: args}))
    encode = Recorder(encoder, views)
    plain(encode, views)
    occluded(encode, views)
    (hidden_image,) = encode.seen
    assert torch.equal(met["plain"][0], met["occluded"][0]), "locals come from the full image"
    assert not torch.allclose(met["plain"][1], met["occluded"][1])
    torch.testing.assert_close(met["occluded"][1].squeeze(-1), encoder(hidden_image).summary)
    changed = hidden_image != views.image.flatten(0, 1)
    assert changed.flatten(1).any(dim=1).all()
    assert not changed.flatten(1).all(dim=1).any()


def test_an_occlusion_block_too_large_for_the_views_is_refused_when_it_is_built() -> None:
    with pytest.raises(UsageError, match="larger views or a smaller occlusion block"):
        objective_of(encoder_of(), occlusion=9)


def test_the_penalty_is_the_weighted_mean_square_of_the_scores() -> None:
    encoder, views = encoder_of(), views_of()
    encode = Recorder(encoder, views)
    free, held = (objective_of(encoder, score_penalty=weight) for weight in (0.0, 0.04))
    scores, _ = free.critic(encode.clean.maps[1].flatten(2), encode.clean.summary.unsqueeze(-1))
    gap = held(encode, views)["local_dim"].loss - free(encode, views)["local_dim"].loss
    assert gap.item() == pytest.approx(0.04 * scores.square().mean().item(), rel=1e-4)


def test_standardising_takes_mean_and_scale_from_the_summary() -> None:
    encoder, views = encoder_of(), views_of()
    encode = Recorder(encoder, views)
    objective = objective_of(encoder, standardise=True).train()
    given: list[torch.Tensor] = []
    objective.critic.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    objective(encode, views)
    summary = given[0].squeeze(-1)
    torch.testing.assert_close(summary.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-4)
    scale = encode.clean.summary.var(dim=0, unbiased=False)
    torch.testing.assert_close(summary.var(dim=0, unbiased=False), scale / (scale + 1e-5), rtol=1e-3, atol=1e-4)


def test_spread_is_zero_for_equal_summaries_and_one_for_centred_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    assert spread(torch.ones(8, 4)).item() == pytest.approx(0, abs=1e-6)
    assert spread(torch.randn(4000, 4, generator=generator)).item() == pytest.approx(1, abs=0.05)
    assert spread(5 + torch.randn(4000, 4, generator=generator)).item() == pytest.approx(1 / math.sqrt(26), abs=0.02)
    assert spread(torch.zeros(8, 4)).item() == 0


# --- learning


def textures(batch: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Images (B, 1, ...) of one grey level each, between -1 and 1, under a little noise."""
    level = 2 * torch.rand(batch, 1, *(1,) * len(shape), generator=generator) - 1
    return level.expand(batch, 1, *shape) + 0.02 * torch.randn(batch, 1, *shape, generator=generator)


def train(estimator: Any, shape: tuple[int, ...], *, shuffled: bool, steps: int = 80) -> tuple[float, float, float]:
    """Held-out loss, chance and retrieval after training; `shuffled` gives each image another's second view."""
    torch.manual_seed(0)
    dims = len(shape)
    encoder = ConvNet(1, dims, shape, channels=(8, 16), kernel_size=3, hidden=0, summary_channels=8, summary="mean_max")
    critic = {"name": "encode_and_dot", "width": 16, "scaled": True}
    objective = LocalDIM(encoder.channels, 8, shape, estimator=estimator, critic=critic)
    optimiser = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(steps + 10):
        image = textures(16, shape, generator)
        other = textures(16, shape, generator) if shuffled else image
        views = Views(torch.stack([image, other], dim=1), torch.zeros(16, 2, dims))
        term = objective(Recorder(encoder, views), views)["local_dim"]
        if step >= steps:  # fresh images, no step: a held-out measure
            found.append((term.loss.item(), term.chance, term.diagnostics["retrieval"].item()))
            continue
        optimiser.zero_grad()
        term.loss.backward()
        optimiser.step()
    loss, chance, share = torch.tensor(found).mean(dim=0).tolist()
    return loss, chance, share


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_what_all_locations_of_an_image_share_is_learnt(estimator: str, shape: tuple[int, ...]) -> None:
    loss, chance, share = train(estimator, shape, shuffled=False)
    assert loss < chance - 0.7
    assert share > 0.4  # 1 / 16 by chance


@pytest.mark.parametrize("estimator", ["infonce", "jsd"])
def test_nothing_is_learnt_where_summary_and_locals_come_from_different_images(estimator: str) -> None:
    loss, chance, share = train(estimator, (8, 8), shuffled=True)
    assert loss > chance - 0.05
    assert share < 0.25
