"""The heads of findings (unknown findings take no part) and of numbers (constants of the target)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from medim.models.heads import LinearProbe, MultiLabelHead, RegressionHead
from medim.types import Features

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
