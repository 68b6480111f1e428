"""A voxel of the occluded view finds itself among the voxels of the clean one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medim.models.decoders import UNetDecoder
from medim.models.encoders import UNetEncoder
from medim.objectives.dense import DenseDIM, draw_points, score_classes
from medim.objectives.occlusion import draw_cube_mask, occlude_image
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features, UsageError, Views

SHAPES = [(8, 12), (6, 8, 4)]
NEGATIVES = ["same_image", "other_images", "all"]
BATCH, POINTS = 3, 7
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_set = pytest.mark.parametrize("negatives", NEGATIVES)


class Mirror:
    """An encoder and decoder whose features are the image's own voxels; keeps what it was shown."""

    def __init__(self, views: Views, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.seen: list[torch.Tensor] = []
        image = views.image.flatten(0, 1)
        self.clean = Features((image,), torch.zeros(len(image), 1))

    def __call__(self, image: torch.Tensor) -> Features:
        self.seen.append(image)
        return Features((image,), torch.zeros(len(image), 1))

    def decode(self, features: Features) -> torch.Tensor:
        return features.maps[0]


def views_of(shape: tuple[int, ...], count: int = 1, channels: int = 2) -> Views:
    image = torch.randn(BATCH, count, channels, *shape, generator=torch.Generator().manual_seed(5))
    return Views(image, torch.zeros(BATCH, count, len(shape)))


def objective_of(shape: tuple[int, ...], **options: Any) -> DenseDIM:
    torch.manual_seed(0)
    return DenseDIM(shape, 2, True, **{"width": 4, "points": POINTS, "mask_patch_size": 2, **options})


def loop(query: torch.Tensor, key: torch.Tensor, negatives: str, clip: float, penalty: float) -> float:
    """The definition, point by point, on embedded points (N, P, D)."""
    places = [(n, p) for n in range(len(query)) for p in range(query.shape[1])]

    def score(a: tuple[int, int], b: tuple[int, int]) -> torch.Tensor:
        return query[a] @ key[b] / math.sqrt(query.shape[2])

    losses, squares = [], []
    for place in places:
        others = {
            "same_image": [b for b in places if b != place and b[0] == place[0]],
            "other_images": [b for b in places if b[0] != place[0]],
            "all": [b for b in places if b != place],
        }[negatives]
        raw = torch.stack([score(place, b) for b in [place, *others]])
        clipped = clip * torch.tanh(raw / clip)
        losses.append(torch.logsumexp(clipped, dim=0) - clipped[0])
        within = [b for b in places if negatives != "same_image" or b[0] == place[0]]
        squares += [score(place, b) ** 2 for b in within]
    return (torch.stack(losses).mean() + penalty * torch.stack(squares).mean()).item()


@every_shape
@every_set
@pytest.mark.parametrize("count", [1, 2])
def test_the_loss_equals_the_loop(shape: tuple[int, ...], negatives: str, count: int) -> None:
    """Points and cubes are drawn again here: a query that met another voxel's key would show."""
    views = views_of(shape, count)
    objective = objective_of(shape, negatives=negatives, clip=0.5, score_penalty=0.1)
    term = objective(Mirror(views, seed=3), views)["dense_dim"]
    generator = torch.Generator().manual_seed(3)
    hidden = draw_cube_mask(BATCH, shape, 2, 0.6, generator)
    index = draw_points(BATCH, math.prod(shape), POINTS, generator)
    objective.double()
    sides = (occlude_image(views.image[:, count - 1], hidden), views.image[:, 0])
    query, key = (
        objective.projection(
            torch.stack([image.double().flatten(1).T[at] for image, at in zip(side, index, strict=True)])
        )
        for side in sides
    )
    assert term.loss.item() == pytest.approx(loop(query, key, negatives, 0.5, 0.1), rel=1e-5)


@every_shape
@pytest.mark.parametrize("count", [1, 2])
def test_the_query_sees_the_last_view_without_what_is_hidden(shape: tuple[int, ...], count: int) -> None:
    views = views_of(shape, count)
    watcher = Mirror(views)
    objective_of(shape)(watcher, views)
    (seen,) = watcher.seen
    last = views.image[:, count - 1]
    hidden = (seen != last).any(dim=1)
    assert 0.3 < hidden.float().mean() < 0.9
    assert hidden.flatten(1).any(dim=1).all()
    for n in range(BATCH):
        means = last[n].flatten(1).mean(dim=1)
        torch.testing.assert_close(seen[n][:, hidden[n]], means.unsqueeze(1).expand(-1, int(hidden[n].sum())))


@every_set
def test_what_is_no_class_has_no_weight(negatives: str) -> None:
    """Planted: were a point's own image let in among `other_images`, or another's among `same_image`, it would show."""
    query, key = torch.randn(2, BATCH, POINTS, 4, generator=torch.Generator().manual_seed(1))
    scores, _ = score_classes(query, key, negatives, 1.0, 20.0)  # type: ignore[arg-type]
    weights = scores.softmax(dim=2)
    if negatives == "same_image":
        assert weights.shape == (BATCH, POINTS, POINTS)
        changed = key.clone()
        changed[1:] += 1
        other, _ = score_classes(query, changed, negatives, 1.0, 20.0)
        assert torch.equal(scores[0], other[0])
        return
    classes = (weights[0] > 0).view(BATCH, POINTS, BATCH, POINTS)
    for n, p in torch.cartesian_prod(torch.arange(BATCH), torch.arange(POINTS)).tolist():
        own = torch.arange(POINTS) == p
        assert torch.equal(classes[n, p, n], own if negatives == "other_images" else torch.ones_like(own))
        assert classes[n, p, torch.arange(BATCH) != n].all()


@every_set
def test_equal_scores_cost_chance_and_right_ones_nothing(negatives: str) -> None:
    views = views_of((8, 12))
    objective = objective_of((8, 12), negatives=negatives, scale_scores=False, clip=0.0, score_penalty=0.0)
    classes = {"same_image": POINTS, "other_images": 1 + (BATCH - 1) * POINTS, "all": BATCH * POINTS}[negatives]
    flat = Views(torch.ones_like(views.image), views.location)
    term = objective(Mirror(flat), flat)["dense_dim"]
    assert term.chance == pytest.approx(math.log(classes))
    assert term.loss.item() == pytest.approx(math.log(classes), abs=1e-5)
    assert term.diagnostics["bound"].item() == pytest.approx(0, abs=1e-5)
    objective.projection = torch.nn.Identity()  # type: ignore[assignment]
    angle = torch.arange(BATCH * 8 * 12).view(BATCH, 1, 1, 8, 12) * (2 * math.pi / (BATCH * 8 * 12))
    known = Views(3000 * torch.cat([angle.cos(), angle.sin()], dim=2), views.location)
    encode = Mirror(known)
    encode.decode = lambda features: known.image[:, 0]  # type: ignore[method-assign]
    term = objective(encode, known)["dense_dim"]
    assert term.loss.item() == pytest.approx(0, abs=1e-4)
    assert term.diagnostics["retrieval"] == 1
    assert term.diagnostics["bound"].item() == pytest.approx(math.log(classes), abs=1e-4)


@pytest.mark.parametrize(("voxels", "points"), [(10, 10), (10, 7), (10, 2), (96, 7)])
def test_points_are_distinct_and_each_voxel_is_as_likely(voxels: int, points: int) -> None:
    index = draw_points(4000, voxels, points, torch.Generator().manual_seed(0))
    assert index.shape == (4000, points)
    assert all(len(row.unique()) == points for row in index[:200])
    often = torch.bincount(index.flatten(), minlength=voxels) / 4000
    assert len(often) == voxels
    assert (often - points / voxels).abs().max() < 4 * math.sqrt(0.25 / 4000)


@every_shape
def test_encoder_and_decoder_learn_and_the_loss_leaves_chance(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = UNetEncoder(1, len(shape), channels=(4, 8), norm="in", summary_channels=4)
    decoder = UNetDecoder(encoder.channels, encoder.strides, len(shape))
    views = views_of(shape, channels=1)
    objective = DenseDIM(shape, decoder.out_channels, True, width=8, points=16, mask_patch_size=2, mask_ratio=0.3)
    trained = torch.nn.ModuleList([encoder, decoder, objective])
    optimiser = torch.optim.Adam(trained.parameters(), lr=0.01)
    for step in range(60):
        encode = StepEncoder(encoder, decoder, views, torch.Generator().manual_seed(step))
        term = objective(encode, views)["dense_dim"]
        optimiser.zero_grad()
        term.loss.backward()
        if not step:
            for part in (encoder, decoder, objective):
                reached = [p.grad is not None and bool(p.grad.any()) for p in part.parameters()]
                assert sum(reached) > len(reached) / 2
        optimiser.step()
    assert term.chance is not None
    assert term.loss.item() < term.chance - 0.3
    assert term.diagnostics["retrieval"] > 2 / 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoded_channels": 0}, "add a decoder"),
        ({"aligned": False}, "views.same_crop: true"),
        ({"points": 1}, r"dense_dim\.points: expected 2"),
        ({"points": 16 * 24 + 1}, r"dense_dim\.points: expected 2"),
        ({"mask_patch_size": 17}, r"dense_dim\.mask_patch_size"),
        ({"mask_ratio": 1.0}, r"dense_dim\.mask_ratio"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DenseDIM(**{"input_shape": (16, 24), "decoded_channels": 4, "aligned": True, **options})
