"""Two views of an image find each other among all views of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from medim.models.encoders import UNetEncoder
from medim.objectives.mutual_information import infonce
from medim.objectives.simclr import SimCLR, score_views
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features, UsageError, Views

BATCH, WIDTH = 3, 5
NO_VIEWS = Views(torch.zeros(0), torch.zeros(0))
Loss = Callable[[torch.Tensor], torch.Tensor]


def projections(batch: int = BATCH) -> torch.Tensor:
    """(2 B, D), the two views of an image side by side, unlike."""
    return torch.randn(2 * batch, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def encode_of(summary: torch.Tensor) -> Any:
    return SimpleNamespace(clean=Features((), summary), generator=torch.Generator())


def plain(temperature: float = 0.1) -> SimCLR:
    """Summaries meet as they are."""
    objective = SimCLR(WIDTH, 2, temperature=temperature)
    objective.project = nn.Sequential(nn.Identity())
    return objective


def loss(z: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    return plain(temperature)(encode_of(z), NO_VIEWS)["simclr"].loss


def algorithm_1(z: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """The paper's algorithm 1, view by view; its 2k - 1 and 2k are 2k and 2k + 1 here."""

    def similarity(i: int, j: int) -> torch.Tensor:
        return z[i] @ z[j] / (z[i].norm() * z[j].norm())

    def pair(i: int, j: int) -> torch.Tensor:
        below = sum(torch.exp(similarity(i, k) / temperature) for k in range(len(z)) if k != i)
        return -torch.log(torch.exp(similarity(i, j) / temperature) / below)

    total = sum(pair(2 * k, 2 * k + 1) + pair(2 * k + 1, 2 * k) for k in range(len(z) // 2))
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_value_and_gradient_are_those_of_algorithm_1(temperature: float) -> None:
    ours, theirs = (projections().requires_grad_() for _ in range(2))
    one, other = loss(ours, temperature), algorithm_1(theirs, temperature)
    one.backward(), other.backward()
    assert one.item() == pytest.approx(other.item(), rel=1e-12)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_of_its_own_differences() -> None:
    assert torch.autograd.gradcheck(loss, projections().requires_grad_())


def test_the_projection_stands_between_summary_and_loss() -> None:
    torch.manual_seed(0)
    objective = SimCLR(6, 2, width=WIDTH, hidden=7, temperature=0.5).double()
    summary = torch.randn(2 * BATCH, 6, dtype=torch.float64)
    first, _, last = objective.project
    z = (summary @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T
    found = objective(encode_of(summary), NO_VIEWS)["simclr"].loss
    assert found.item() == pytest.approx(algorithm_1(z).item(), rel=1e-12)


def test_the_projection_has_the_papers_sizes_unless_told_otherwise() -> None:
    first, _, last = SimCLR(64, 2).project
    assert (first.in_features, first.out_features, last.out_features) == (64, 64, 128)


# --- what it must not depend on, and what a known code costs


def test_neither_the_length_of_a_projection_nor_a_rotation_of_all_plays_a_part() -> None:
    z = projections()
    turn = torch.linalg.qr(projections(5)[:WIDTH]).Q
    longer = z * torch.linspace(0.1, 30, len(z), dtype=z.dtype).unsqueeze(1)
    assert loss(longer).item() == pytest.approx(loss(z).item(), rel=1e-12)
    assert loss(z @ turn).item() == pytest.approx(loss(z).item(), rel=1e-12)


def test_neither_the_order_of_the_images_nor_that_of_the_views_plays_a_part() -> None:
    pairs = projections().reshape(BATCH, 2, WIDTH)
    for changed in (pairs[[2, 0, 1]], pairs.flip(1), torch.cat([pairs[:1].flip(1), pairs[1:]])):
        assert loss(changed.flatten(0, 1)).item() == pytest.approx(loss(pairs.flatten(0, 1)).item(), rel=1e-12)


def test_views_that_are_all_alike_cost_chance_and_known_ones_next_to_nothing() -> None:
    alike = plain()(encode_of(torch.ones(8, WIDTH)), NO_VIEWS)["simclr"]
    assert alike.chance == pytest.approx(math.log(7))
    assert alike.loss.item() == pytest.approx(math.log(7), abs=1e-5)
    known = plain(0.01)(encode_of(torch.eye(4).repeat_interleave(2, dim=0)), NO_VIEWS)["simclr"]
    assert known.loss.item() == pytest.approx(0, abs=1e-5)
    assert known.diagnostics["retrieval"] == 1
    assert known.diagnostics["bound"].item() == pytest.approx(math.log(7), abs=1e-5)


# --- planted faults: a check that the real loss passes and the fault fails


def every_view_meets_all_others_and_not_itself(given: Loss) -> None:
    """Three orthogonal images, both views alike: one positive at cosine 1, four negatives at 0, nothing else."""
    z = torch.eye(3, dtype=torch.float64).repeat_interleave(2, dim=0)
    assert given(z).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)), rel=1e-9)


def the_other_view_is_what_a_view_must_find(given: Loss) -> None:
    """Views whose other view is another image's are worse off than chance."""
    code = torch.eye(4, dtype=torch.float64)
    assert given(torch.stack([code, code.roll(1, dims=0)], dim=1).flatten(0, 1)).item() > math.log(7)


def both_views_of_an_image_are_sources(given: Loss) -> None:
    """Each view draws its other one closer, as in algorithm 1."""
    ours, theirs = (projections().requires_grad_() for _ in range(2))
    given(ours).backward(), algorithm_1(theirs).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def found_by_itself(z: torch.Tensor) -> torch.Tensor:
    """No pair is left out: a view is a positive of its own."""
    return math.log(len(z) - 1) - infonce(score_views(z, 0.5)[0])


def with_itself_below(z: torch.Tensor) -> torch.Tensor:
    """The diagonal is not masked: a view is a class of its own, at cosine 1."""
    scores, _ = score_views(z, 0.5)
    flat = scores.reshape(len(z), len(z))
    return nn.functional.cross_entropy(flat, torch.arange(len(z)) ^ 1)


def views_in_halves(z: torch.Tensor) -> torch.Tensor:
    """View 1 of all images, then view 2 of all, taken for pairs side by side."""
    return loss(torch.cat([z[0::2], z[1::2]]))


def one_way(z: torch.Tensor) -> torch.Tensor:
    """Only the first view of each image looks for the second, among second views."""
    unit = nn.functional.normalize(z, dim=1)
    return nn.functional.cross_entropy(unit[0::2] @ unit[1::2].T / 0.5, torch.arange(len(z) // 2))


FAULTS = [
    (every_view_meets_all_others_and_not_itself, with_itself_below, "diagonal-not-masked"),
    (every_view_meets_all_others_and_not_itself, one_way, "half-of-the-negatives"),
    (the_other_view_is_what_a_view_must_find, found_by_itself, "own-view-as-a-positive"),
    (both_views_of_an_image_are_sources, one_way, "one-direction"),
    (both_views_of_an_image_are_sources, views_in_halves, "views-laid-out-in-halves"),
]


@pytest.mark.parametrize(("check", "fault"), [pytest.param(c, f, id=name) for c, f, name in FAULTS])
def test_a_planted_fault_fails_the_check_that_the_real_loss_passes(check: Callable[[Loss], None], fault: Loss) -> None:
    check(loss)
    with pytest.raises(AssertionError):
        check(fault)


# --- in training


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 8)])
def test_two_noisy_views_are_told_from_other_images(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = UNetEncoder(1, len(shape), channels=(4, 8), norm="bn", summary_channels=8)
    objective = SimCLR(8, 2, width=8, temperature=0.2)
    optimiser = torch.optim.Adam([*encoder.parameters(), *objective.parameters()], lr=0.01)
    image = torch.linspace(-2, 2, 6).view(6, *[1] * (2 + len(shape)))  # told by brightness
    for step in range(60):
        noise = 0.1 * torch.randn(6, 2, 1, *shape)
        views = Views(image + noise, torch.zeros(6, 2, len(shape)))
        encode = StepEncoder(encoder, None, views, torch.Generator().manual_seed(step))
        term = objective(encode, views)["simclr"]
        optimiser.zero_grad()
        term.loss.backward()
        optimiser.step()
    assert term.chance == pytest.approx(math.log(11))
    assert term.loss.item() < term.chance - 0.8
    assert term.diagnostics["retrieval"] > 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view_count": 1}, "Set views.count: 2"),
        ({"temperature": 0.0}, r"simclr\.temperature: expected above 0, got 0\.0"),
        ({"temperature": math.nan}, r"simclr\.temperature"),
        ({"width": 0}, r"simclr\.width: expected one or more numbers above 0"),
        ({"hidden": -1}, r"simclr\.hidden: expected one or more numbers above 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SimCLR(**{"summary_channels": 5, "view_count": 2, **options})
