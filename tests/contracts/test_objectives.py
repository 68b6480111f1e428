"""What every entry of OBJECTIVES promises, in 2D and 3D, with one view and two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from medim.config import build_from_section
from medim.models.encoders import UNetEncoder
from medim.models.serialization import load_weights, save_model
from medim.objectives import OBJECTIVES, Term
from medim.types import Features, UsageError, Views

CRITIC = {"name": "encode_and_dot", "width": 8}
CONCAT = {"name": "concat_and_convolve", "hidden": [8, 8]}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "local_dim": [
        {"critic": CRITIC},
        {"critic": CRITIC, "estimator": "infonce", "batch_norm_summary": True, "score_penalty": 0.04, "occlusion": 4},
        {"critic": CRITIC, "estimator": "dv", "feature_level": 0},
        {"critic": CRITIC, "estimator": "infonce", "summary_level": -1, "negatives": "permuted", "foreground": 0.5},
        {"critic": CONCAT, "negatives": "rolled", "occlusion": "receptive_field", "feature_level": 0},
    ],
    "global_dim": [
        {"critic": CONCAT},
        {"critic": CRITIC, "estimator": "infonce", "reduce": [4], "batch_norm_summary": True, "occlusion": 4},
        {"critic": {"name": "bilinear"}, "estimator": "dv", "negatives": "permuted", "score_penalty": 0.04},
    ],
    "coordinates": [
        {"hidden": 8},
        {"hidden": 8, "points": 5, "use_summary": False},
        {"hidden": 8, "kind": "relative"},
    ],
    "prior_matching": [{"hidden": [8]}, {"hidden": [8], "prior": "gaussian"}],
    "reconstruction": [{"mask_patch_size": 4}, {"mask_patch_size": 3, "mask_ratio": 0.3}],
    "cpc": [{"layers": 2}, {"feature_level": 0, "steps": 2, "skip": 0, "negatives": 5, "scale_scores": True}],
    "vae": [{"decoder_channels": [8, 4]}, {"decoder_channels": [4], "norm": "gn", "beta": 0.5}],
    "beta_vae": [{"decoder_channels": [8, 4]}],
    "amdim": [{"width": 8}, {"width": 6, "levels": [0, 1], "clip": 5.0}],
    "simclr": [{"width": 8}, {"width": 5, "hidden": 7, "temperature": 0.5}],
    "dense_dim": [
        {"width": 8, "points": 12, "mask_patch_size": 4},
        {
            "width": 8,
            "points": 5,
            "mask_patch_size": 3,
            "negatives": "all",
            "scale_scores": False,
            "clip": 0.0,
            "score_penalty": 0.0,
        },
        {"width": 8, "points": 5, "mask_patch_size": 3, "negatives": "other_images"},
    ],
}
SHAPES: dict[int, tuple[int, ...]] = {2: (8, 12), 3: (8, 12, 8)}
every_objective = pytest.mark.parametrize(
    ("section", "dims", "count"),
    [
        pytest.param({"name": name, **options}, dims, count, id=f"{name}-{n}-{dims}d-{count}v")
        for name in OBJECTIVES
        for n, options in enumerate(VARIANTS.get(name, [{}]))
        for dims in (2, 3)
        for count in getattr(OBJECTIVES[name], "view_counts", (1, 2))
    ],
)


class Step:
    """The encoder as an objective sees it."""

    def __init__(self, encoder: nn.Module, views: Views, seed: int = 0) -> None:
        self._encoder = encoder
        self.clean: Features = encoder(views.image.flatten(0, 1))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, image: torch.Tensor) -> Features:
        features: Features = self._encoder(image)
        return features

    def decode(self, features: Features) -> torch.Tensor:
        return features.maps[0][:, :1]


def make(section: dict[str, Any], dims: int, count: int) -> tuple[UNetEncoder, Any]:
    torch.manual_seed(0)
    encoder = UNetEncoder(1, dims, channels=(4, 8), norm="gn", summary_channels=6)
    return encoder, objective_of(section, dims, encoder, count)


def objective_of(section: dict[str, Any], dims: int, encoder: UNetEncoder, count: int) -> Any:
    return build_from_section(
        OBJECTIVES,
        section,
        channels=encoder.channels,
        summary_channels=encoder.summary_channels,
        spatial_dims=dims,
        grids=tuple(tuple(side // stride for side in SHAPES[dims]) for stride in encoder.strides),
        in_channels=1,
        input_shape=SHAPES[dims],
        view_count=count,
        aligned=True,
        decoded_channels=1,
        receptive_fields=tuple(encoder.receptive_field(level) for level in range(2)),
        origins=encoder.origins,
        strides=encoder.strides,
    )


def views_of(dims: int, count: int, batch: int = 4) -> Views:
    image = torch.randn(batch, count, 1, *SHAPES[dims], generator=torch.Generator().manual_seed(1))
    return Views(image, torch.zeros(batch, count, dims))


def losses(terms: dict[str, Term]) -> dict[str, float]:
    return {name: term.loss.item() for name, term in terms.items()}


@every_objective
def test_terms_are_finite_scalars_with_scalar_diagnostics(section: dict[str, Any], dims: int, count: int) -> None:
    encoder, objective = make(section, dims, count)
    views = views_of(dims, count)
    terms = objective(Step(encoder, views), views)
    assert terms
    for name, term in terms.items():
        assert name.isidentifier(), "a term's name is a key of history.csv and summary.json"
        assert term.loss.shape == ()
        assert term.loss.isfinite()
        assert term.loss.dtype == torch.float32
        assert term.chance is None or term.chance >= 0
        for value in term.diagnostics.values():
            assert value.shape == ()
            assert not value.requires_grad


@every_objective
def test_gradients_reach_the_encoder_and_all_that_is_the_objectives_own(
    section: dict[str, Any], dims: int, count: int
) -> None:
    encoder, objective = make(section, dims, count)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(1e-3)  # past weights that start at 0 no gradient flows at first
    views = views_of(dims, count)
    step = Step(encoder, views)
    adversary = {id(p) for p in getattr(objective, "adversary_parameters", tuple)()}
    if adversary:
        objective.adversary_loss(step, views).backward()
        assert all(p.grad is None for p in encoder.parameters())
        objective.zero_grad()
    sum(term.loss for term in objective(step, views).values()).backward()
    own = {n: p for n, p in objective.named_parameters() if id(p) not in adversary}
    assert not [n for n, p in own.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters() if id(p) in adversary)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if hasattr(OBJECTIVES[name], "view_counts")])
def test_an_objective_rejects_another_number_of_views(name: str) -> None:
    counts = {1, 2, 3} - {*getattr(OBJECTIVES[name], "view_counts", ())}
    assert counts
    for count in counts:
        with pytest.raises(UsageError, match=r"views\.count"):
            make({"name": name, **VARIANTS.get(name, [{}])[0]}, 2, count)


@every_objective
def test_an_objective_says_whether_it_trains_the_summary(section: dict[str, Any], dims: int, count: int) -> None:
    encoder, objective = make(section, dims, count)
    views = views_of(dims, count)
    sum(term.loss for term in objective(Step(encoder, views), views).values()).backward()
    trained = any(p.grad is not None and p.grad.any() for p in encoder.to_summary.parameters())
    assert trained == getattr(objective, "reads_summary", True)


@every_objective
def test_a_step_can_be_replayed_from_its_generator(section: dict[str, Any], dims: int, count: int) -> None:
    encoder, objective = make(section, dims, count)
    views = views_of(dims, count)
    first, second = (losses(objective(Step(encoder, views, seed=3), views)) for _ in range(2))
    torch.manual_seed(99)  # the global state plays no part
    assert first == second == losses(objective(Step(encoder, views, seed=3), views))


@every_objective
def test_the_order_of_the_batch_plays_no_part(section: dict[str, Any], dims: int, count: int) -> None:
    if getattr(make(section, dims, count)[1], "draws_per_image", False):
        pytest.skip("masks, noise or source locations are drawn for each image")
    plain = {k: v for k, v in section.items() if k not in ("occlusion", "points", "negatives")}  # drawn, too
    encoder, objective = make(plain, dims, count)
    views = views_of(dims, count)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Views(views.image[order], views.location[order])
    straight, moved = (losses(objective(Step(encoder, v), v)) for v in (views, shuffled))
    assert straight == pytest.approx(moved, rel=1e-4, abs=1e-4)


@every_objective
def test_an_objective_that_knows_nothing_pays_chance(section: dict[str, Any], dims: int, count: int) -> None:
    encoder, objective = make(section, dims, count)
    if not getattr(objective, "blind_loss_is_chance", True):
        pytest.skip("the best uninformed guess needs parameters other than 0")
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.zero_()
    views = views_of(dims, count)
    for term in objective(Step(encoder, views), views).values():
        assert term.chance is None or term.loss.item() == pytest.approx(term.chance, abs=1e-4)


@every_objective
def test_bf16_changes_the_losses_by_rounding_only(section: dict[str, Any], dims: int, count: int) -> None:
    encoder, objective = make(section, dims, count)
    views = views_of(dims, count)
    exact = losses(objective(Step(encoder, views), views))
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(Step(encoder, views), views)
        if hasattr(objective, "adversary_loss"):
            assert objective.adversary_loss(Step(encoder, views), views).dtype == torch.float32
    assert all(term.loss.dtype == torch.float32 for term in terms.values())
    assert losses(terms) == pytest.approx(exact, rel=0.05, abs=0.05)
    sum(term.loss for term in terms.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())


@every_objective
def test_a_saved_objective_comes_back_bit_for_bit(
    section: dict[str, Any], dims: int, count: int, tmp_path: Path
) -> None:
    encoder, objective = make(section, dims, count)
    views = views_of(dims, count)
    objective(Step(encoder, views), views)
    save_model(tmp_path, "critic", objective, {"kind": "critic"})
    again = objective_of(section, dims, encoder, count)
    load_weights(again, tmp_path / "critic.safetensors")
    objective.eval(), again.eval()
    assert losses(again(Step(encoder, views), views)) == losses(objective(Step(encoder, views), views))
