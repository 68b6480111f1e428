"""The head of findings: what is not known of an image takes no part."""

from __future__ import annotations

import math

import pytest
import torch

from medim.models.heads import MultiLabelHead

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
