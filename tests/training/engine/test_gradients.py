from __future__ import annotations

import pytest
import torch
from torch import nn

from medim.training.engine.gradients import gradient_norms


def test_a_norm_is_that_of_the_parts_own_trained_parameters() -> None:
    one, two, rest = nn.Linear(2, 1), nn.Linear(2, 1, bias=False), nn.Linear(2, 1)
    (3 * one.weight.sum() + one.bias.sum() + 4 * two.weight.sum()).backward()
    found = gradient_norms({"one": one, "two": two, "rest": rest, "none": None}, [*one.parameters(), two.weight])
    assert {name: norm.item() for name, norm in found.items()} == pytest.approx({"one": 19**0.5, "two": 32**0.5})
    assert gradient_norms({"one": one}, []) == {}
    assert torch.equal(one.weight.grad, torch.full((1, 2), 3.0))  # type: ignore[arg-type]
