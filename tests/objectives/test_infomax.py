"""DIM(L) and DIM(G): which summary meets what, what is hidden or left out of it, and what a critic can learn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from medim.models.encoders import ConvNet, UNetEncoder
from medim.objectives.infomax import GlobalDIM, LocalDIM
from medim.objectives.mutual_information import ESTIMATORS, EstimatorName, NegativeScheme, infonce
from medim.training.pretrain.module import PretrainModule
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
    fields = tuple(encoder.receptive_field(level) for level in range(len(encoder.channels)))
    places = encoder.origins, encoder.strides
    return LocalDIM(encoder.channels, encoder.summary_channels, shape, fields, *places, **options).eval()


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
    term = objective_of(encoder, estimator="infonce", feature_level=level)(Recorder(encoder, views), views)["local_dim"]
    assert term.chance == pytest.approx(math.log(1 + 3 * locations))


def test_a_level_the_encoder_has_not_is_refused() -> None:
    for level in (2, -3):
        with pytest.raises(UsageError, match=rf"local_dim\.feature_level: expected 0 to 1, or -1 to -2.*got {level}"):
            objective_of(encoder_of(), feature_level=level)


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
    objective = objective_of(encoder, batch_norm_summary=True).train()
    given: list[torch.Tensor] = []
    objective.critic.register_forward_pre_hook(lambda _, args: given.append(args[1]))
    objective(encode, views)
    summary = given[0].squeeze(-1)
    torch.testing.assert_close(summary.mean(dim=0), torch.zeros(6), rtol=0, atol=1e-4)
    scale = encode.clean.summary.var(dim=0, unbiased=False)
    torch.testing.assert_close(summary.var(dim=0, unbiased=False), scale / (scale + 1e-5), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_a_summary_level_every_cell_of_that_map_is_a_summary(estimator: EstimatorName) -> None:
    encoder, views = encoder_of(), views_of()
    objective = objective_of(encoder, estimator=estimator, feature_level=0, summary_level=-1)
    encode = Recorder(encoder, views)
    scores, _ = objective.critic(encode.clean.maps[0].flatten(2), encode.clean.maps[1].flatten(2))
    assert scores.shape == (4, 6 * 8, 4, 12 * 16)
    bound = objective(encode, views)["local_dim"].diagnostics["bound"]
    torch.testing.assert_close(bound, ESTIMATORS[estimator](scores).detach())


@pytest.mark.parametrize("critic", [CRITIC, {"name": "concat_and_convolve", "hidden": [8]}])
def test_rolled_negatives_are_the_locations_of_the_next_image(critic: dict[str, Any]) -> None:
    encoder, views = encoder_of(), views_of()
    objective = objective_of(encoder, estimator="jsd", negatives="rolled", critic=critic)
    encode = Recorder(encoder, views)
    scores, _ = objective.critic(encode.clean.maps[1].flatten(2), encode.clean.summary.unsqueeze(-1))
    rows = torch.arange(4)
    own, following = scores[rows, 0, rows], scores[rows, 0, (rows + 1) % 4]
    softplus = torch.nn.functional.softplus
    expected = 2 * math.log(2) - softplus(-own).mean() - softplus(following).mean()
    assert objective(encode, views)["local_dim"].loss.item() == pytest.approx(-expected.item(), rel=1e-4)
    contrast = objective_of(encoder, estimator="infonce", negatives="rolled", critic=critic)(encode, views)
    assert contrast["local_dim"].chance == pytest.approx(math.log(1 + 6 * 8))


@pytest.mark.parametrize("negatives", ["all", "rolled", "permuted"])
def test_locations_in_the_background_are_neither_positives_nor_negatives(negatives: NegativeScheme) -> None:
    encoder = encoder_of()
    image = views_of().image
    image[:, :, :, :, :8] = -20.0  # the left half of every image is air
    views = Views(image, torch.zeros(4, 1, 2))
    objective = objective_of(encoder, estimator="infonce", negatives=negatives, foreground=0.5)
    encode = Recorder(encoder, views)
    term = objective(encode, views)["local_dim"]
    halves = 6 * 4
    assert term.chance == pytest.approx(math.log(1 + halves * (3 if negatives == "all" else 1)))
    if negatives == "all":
        local = encode.clean.maps[1][..., 4:].flatten(2)
        scores, _ = objective.critic(local, encode.clean.summary.unsqueeze(-1))
        assert term.diagnostics["bound"].item() == pytest.approx(infonce(scores).item(), abs=1e-5)


def test_views_of_air_alone_teach_nothing_and_break_nothing() -> None:
    encoder, views = encoder_of(), Views(torch.zeros(4, 1, 1, 12, 16), torch.zeros(4, 1, 2))
    for estimator in ESTIMATORS:
        objective = objective_of(encoder, estimator=estimator, foreground=0.5, score_penalty=0.1)
        term = objective(Recorder(encoder, views), views)["local_dim"]
        term.loss.backward()
        assert term.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_no_cell_or_every_cell_has_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=rf"local_dim\.foreground: expected a share above 0.*, got {share}"):
        objective_of(encoder_of(), foreground=share)


def test_the_receptive_field_can_be_the_block_of_the_occlusion() -> None:
    encoder, views = encoder_of(), views_of()
    named, given = (objective_of(encoder, feature_level=0, occlusion=block) for block in ("receptive_field", 5))
    assert encoder.receptive_field(0) == 5
    losses = [objective(Recorder(encoder, views), views)["local_dim"].loss.item() for objective in (named, given)]
    assert losses[0] == losses[1]
    with pytest.raises(UsageError, match="side 11"):
        objective_of(encoder, feature_level=1, occlusion="receptive_field")


# --- DIM(G)


def global_dim(encoder: Any, shape: tuple[int, ...] = (12, 16), **options: Any) -> GlobalDIM:
    torch.manual_seed(2)
    grids = tuple(tuple(side // stride for side in shape) for stride in encoder.strides)
    options = {"critic": {"name": "concat_and_convolve", "hidden": [8]}, **options}
    return GlobalDIM(encoder.channels, encoder.summary_channels, len(shape), grids, shape, (5, 11), **options).eval()


@pytest.mark.parametrize("shape", [(12, 16), (12, 16, 8)])
def test_dim_g_scores_whole_maps_with_summaries(shape: tuple[int, ...]) -> None:
    encoder, views = encoder_of(len(shape)), views_of(shape=shape)
    objective = global_dim(encoder, shape, estimator="infonce")
    encode = Recorder(encoder, views)
    whole = encode.clean.maps[-1].flatten(1).unsqueeze(-1)
    scores, _ = objective.critic(whole, encode.clean.summary.unsqueeze(-1))
    assert scores.shape == (4, 1, 4, 1)
    term = objective(encode, views)["global_dim"]
    assert term.chance == pytest.approx(math.log(4))
    assert term.loss.item() == pytest.approx(math.log(4) - infonce(scores).item(), abs=1e-5)


def test_the_global_critic_of_the_tutorials_has_their_shapes() -> None:
    """dim-spec 7.1: 128x26x26, 3x3 convolutions of 64 and 32 channels, flattened beside 64, then 512, 512, 1."""
    objective = GlobalDIM((128,), 64, 2, ((26, 26),), (32, 32), (7,), reduce=(64, 32))
    assert objective.flatten(torch.zeros(2, 128, 26, 26)).shape == (2, 32 * 22 * 22)
    kinds = [type(layer).__name__ for layer in objective.flatten]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "Flatten"]
    widths = [(layer.in_features, layer.out_features) for layer in (*objective.critic.hidden, objective.critic.score)]
    assert widths == [(32 * 22 * 22 + 64, 512), (512, 512), (512, 1)]


def test_convolutions_that_leave_nothing_of_a_map_are_refused() -> None:
    with pytest.raises(UsageError, match=r"global_dim\.reduce.*3 unpadded.*\(6, 8\)"):
        global_dim(encoder_of(), reduce=(4, 4, 4))


def test_dim_g_hides_from_the_summary_and_crosses_two_views() -> None:
    encoder, views = encoder_of().eval(), views_of(count=2)
    objective, met = global_dim(encoder, occlusion=4), []
    objective.critic.register_forward_pre_hook(lambda _, args: met.append(args))
    encode = Recorder(encoder, views)
    objective(encode, views)
    (hidden_image,) = encode.seen
    summary = encoder(hidden_image).summary
    for view, (local, given, _) in enumerate(met):
        torch.testing.assert_close(given.squeeze(-1), summary[view::2])
        torch.testing.assert_close(local.squeeze(-1), encoder(views.image[:, 1 - view]).maps[-1].flatten(1))


def test_local_and_global_dim_together_are_their_weighted_sum() -> None:
    """Eq. 8 of the paper: alpha and beta are the weights of two objectives of a run."""
    encoder, views = encoder_of(), views_of()
    objectives = {"local_dim": (objective_of(encoder), 0.1), "global_dim": (global_dim(encoder), 0.5)}
    module = PretrainModule(
        encoder, None, objectives, optimisation={"lr": 0.1, "weight_decay": 0}, gradient_clip=0, seed=0
    )
    encode = Recorder(encoder, views)
    terms = {name: objective(encode, views)[name] for name, (objective, _) in objectives.items()}
    expected = 0.1 * terms["local_dim"].loss + 0.5 * terms["global_dim"].loss
    assert module.total_loss(terms).item() == pytest.approx(expected.item())


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
    critic = {"name": "encode_and_dot", "width": 16, "scale_scores": True}
    places = encoder.origins, encoder.strides
    objective = LocalDIM(encoder.channels, 8, shape, (3, 7), *places, estimator=estimator, critic=critic)
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
