"""The losses of the heads: unknown findings, constants of numbers, Dice of each image, class weights and focal loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from monai.losses.focal_loss import FocalLoss
from torch.nn.functional import cross_entropy

from medim.config import build_from_section
from medim.models.heads import HEADS, LinearProbe, MultiLabelHead, RegressionHead, focal_cross_entropy
from medim.types import IGNORE_INDEX, Features, UsageError

NAN = math.nan


def head() -> MultiLabelHead:
    return MultiLabelHead((4, 6), 5, 3)


def test_the_loss_is_the_mean_over_what_is_known_of_minus_log_the_probability_of_the_truth() -> None:
    logits = torch.tensor([[0.3, -1.2, 2.0], [0.7, 0.1, -0.4]])
    target = torch.tensor([[1.0, NAN, 0.0], [NAN, 0.0, 1.0]])
    told = [(0.3, 1), (2.0, 0), (0.1, 0), (-0.4, 1)]
    by_hand = [-math.log(1 / (1 + math.exp(-z if y else z))) for z, y in told]
    assert head().loss(logits, target).item() == pytest.approx(sum(by_hand) / 4)


def test_an_unknown_finding_has_no_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    head().loss(logits, torch.tensor([[1.0, NAN, 0.0], [NAN, NAN, 1.0]])).backward()
    assert logits.grad is not None
    assert (logits.grad == 0).tolist() == [[False, True, False], [True, True, False]]


def test_a_batch_of_which_nothing_is_known_costs_nothing() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = head().loss(logits, torch.full((2, 3), NAN))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_findings_do_not_compete() -> None:
    """The planted fault is a softmax: with it, two findings that are both present could not both be certain."""
    assert head().loss(torch.full((1, 3), 30.0), torch.ones(1, 3)).item() < 1e-6


def test_a_large_mean_of_the_labels_changes_no_loss_and_no_difference_of_predictions() -> None:
    """The planted fault is arithmetic in float32, whose spacing at 1e9 is 64, more than twice this deviation."""
    torch.manual_seed(0)
    maps = (torch.randn(6, 4, 4, 4), torch.randn(6, 6, 2, 2))
    features = Features(maps, torch.randn(6, 5))
    target = 20 * torch.randn(6, 1, dtype=torch.float64)
    probe = LinearProbe(torch.zeros(5), torch.ones(5), 20 * torch.randn(1, 5), torch.zeros(1))
    losses, predictions = [], []
    for mean in (0.0, 1e9):
        head = RegressionHead((4, 6), 5, 1, mean=mean, std=20.0).eval()
        head.start_from(replace(probe, bias=torch.tensor([mean], dtype=torch.float64)))
        answer = head(features)
        losses.append(head.loss(answer, target + mean))
        predictions.append(answer - mean)
    assert predictions[0].std() > 1
    torch.testing.assert_close(predictions[1], predictions[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses[1], losses[0])
    assert losses[0].dtype == torch.float32


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, NAN), (math.inf, 1.0), (0.0, math.inf)])
def test_constants_of_the_target_that_cannot_be_used_are_refused(mean: float, std: float) -> None:
    with pytest.raises(ValueError, match="expected a finite mean and a finite std above 0"):
        RegressionHead((4, 6), 5, 1, mean=mean, std=std)


WEIGHTS = (0.2, 1.0, 1.8)
GRIDS = {"classification": (), "segmentation": (5, 4)}


def build_head(name: str, **options: Any) -> Any:
    run_args = {"channels": (4, 6), "summary_channels": 5, "spatial_dims": 2, "out_channels": 3}
    return build_from_section(HEADS, {"name": name, **options}, **run_args)


def make_batch(name: str, *, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random logits (count, 3, ...), and targets."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, 3, *GRIDS[name], generator=generator)
    return logits, torch.randint(0, 3, (count, *GRIDS[name]), generator=generator)


@pytest.mark.parametrize("name", GRIDS)
def test_class_weights_are_those_of_the_cross_entropy_of_pytorch(name: str) -> None:
    logits, target = make_batch(name)
    weighted, plain = (build_head(name, class_weights=w).loss(logits, target) for w in (WEIGHTS, None))
    expected = cross_entropy(logits, target, torch.tensor(WEIGHTS)) - cross_entropy(logits, target)
    torch.testing.assert_close(weighted - plain, expected, rtol=1e-5, atol=1e-6)
    assert abs(expected) > 1e-3


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("name", GRIDS)
def test_the_focal_loss_is_that_of_monai(name: str, gamma: float) -> None:
    """MONAI takes the mean over images or voxels and classes, of which all but the true one are 0."""
    logits, target = make_batch(name)
    weights = torch.tensor(WEIGHTS)
    costs = FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True, weight=WEIGHTS, reduction="none")
    expected = costs(logits, target[:, None]).sum() / weights[target].sum()
    torch.testing.assert_close(focal_cross_entropy(logits, target[:, None], weights, gamma), expected)
    head, plain = build_head(name, class_weights=WEIGHTS, focal_gamma=gamma), build_head(name)
    found = head.loss(logits, target) - plain.loss(logits, target) + cross_entropy(logits, target)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_gradient_of_the_focal_loss_is_finite_at_certainty(name: str, gamma: float) -> None:
    """At p = 1 the derivative of (1 - p)^gamma is infinite for a gamma below 1."""
    logits, target = make_batch(name)
    logits = (200 * logits.round()).requires_grad_()
    build_head(name, focal_gamma=gamma).loss(logits, target).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().sum() > 0


def test_dice_of_each_image_counts_a_small_structure_as_much_as_a_large_one() -> None:
    """A missed voxel costs half the Dice of its image, and nearly nothing beside the 12 voxels of the other image."""
    target = torch.zeros(2, 4, 4, dtype=torch.int64)
    target[0, :3], target[1, 0, 0] = 1, 1
    logits = torch.zeros(2, 3, 4, 4)
    logits[:, 0], logits[:, 2] = 20.0, -20.0
    logits[0, 1, :3] = 40.0  # the large structure is found, the small one is not
    of_batch, of_images = (build_head("segmentation", dice=dice).loss(logits, target) for dice in ("batch", "image"))
    assert of_images - of_batch > 0.2
    one = [build_head("segmentation", dice=dice).loss(logits[:1], target[:1]) for dice in ("batch", "image")]
    assert one[0] == one[1]


def test_the_options_of_a_loss_are_no_weights_of_the_network() -> None:
    for name in GRIDS:
        options = {"class_weights": WEIGHTS, "focal_gamma": 2.0}
        assert build_head(name, **options).state_dict().keys() == build_head(name).state_dict().keys()


def test_balanced_weights_are_equal_before_a_run_fits_them() -> None:
    for name in GRIDS:
        logits, target = make_batch(name)
        fitted, plain = build_head(name, class_weights="balanced"), build_head(name)
        torch.testing.assert_close(fitted.loss(logits, target), plain.loss(logits, target))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "regression", "focal_gamma": 2.0}, "regression: no option 'focal_gamma'.*There are: hidden, maps"),
        ({"name": "multi_label", "class_weights": "balanced"}, "multi_label: no option 'class_weights'"),
        ({"name": "classification", "dice": "image"}, "classification: no option 'dice'"),
        ({"name": "segmentation", "dice": "images"}, "segmentation.dice: expected batch or image, got 'images'"),
        ({"name": "segmentation", "class_weights": "balancd"}, "segmentation.class_weights: expected balanced or a li"),
        (
            {"name": "segmentation", "class_weights": [1, 0, 1]},
            "class_weights: expected balanced or a number of at least 1e-06, got .1, 0, 1",
        ),
        ({"name": "segmentation", "focal_gamma": -1}, "focal_gamma: expected a number of at least 0, got -1"),
        ({"name": "segmentation", "focal_gamma": True}, "focal_gamma: expected a number, got true or false"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_head(**section)


def test_another_number_of_class_weights_than_of_outputs_is_refused() -> None:
    for name in GRIDS:
        with pytest.raises(ValueError, match="class_weights: expected 3 numbers, one for each output, got 2"):
            build_head(name, class_weights=(1.0, 2.0))


@pytest.mark.parametrize("options", [{}, {"dice": "image"}, {"class_weights": (1.0, 2.0, 3.0), "focal_gamma": 2.0}])
def test_voxels_without_a_label_change_neither_the_loss_nor_its_gradient(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    head = HEADS["segmentation"]((4,), 2, 3, **options)
    logits = torch.randn(2, 3, 6, 6, requires_grad=True)
    target = torch.randint(0, 3, (2, 6, 6))
    target[:, :, 4:] = IGNORE_INDEX
    loss = head.loss(logits, target)
    loss.backward()
    gradient = logits.grad
    assert gradient is not None
    assert gradient[..., 4:].abs().max() == 0
    assert gradient[..., :4].abs().max() > 0
    part = head.loss(logits[..., :4], target[..., :4])
    assert loss.item() == pytest.approx(part.item(), abs=1e-6)


def test_a_batch_without_any_label_has_a_finite_loss() -> None:
    head = HEADS["segmentation"]((4,), 2, 3)
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = head.loss(logits, torch.full((1, 4, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
