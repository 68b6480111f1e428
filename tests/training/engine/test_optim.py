"""The schedule's shape, and who is decayed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from medim.config import OptimiserName
from medim.training.engine.optim import build_optimiser


def rates(warmup: int, steps: int, *, lr: float = 0.1, **options: Any) -> list[float]:
    adamw, schedule = build_optimiser(
        [(nn.Linear(1, 1), 1.0)], lr=lr, weight_decay=0, warmup_steps=warmup, max_steps=steps, **options
    )
    found = []
    for _ in range(steps):
        found.append(adamw.param_groups[0]["lr"])
        adamw.step()
        schedule.step()
    return found


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine() -> None:
    found = rates(5, 25)
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert found[5:] == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 20)) for step in range(20)])
    assert 0 < found[-1] < 0.001


def test_without_warm_up_the_first_step_has_the_peak_rate() -> None:
    found = rates(0, 10)
    assert found[0] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)


def test_a_constant_rate_stays_after_the_warm_up() -> None:
    assert rates(2, 5, schedule="constant") == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1])


def test_a_rate_in_steps_falls_to_a_fifth_at_each() -> None:
    assert rates(0, 6, schedule="multistep", lr_milestones=(2, 4)) == pytest.approx(
        [0.1, 0.1, 0.02, 0.02, 0.004, 0.004]
    )


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("radam", torch.optim.RAdam)]
)
def test_the_optimiser_of_the_config_steps_with_its_betas(
    name: OptimiserName, kind: type[torch.optim.Optimizer]
) -> None:
    made, _ = build_optimiser(
        [(nn.Linear(1, 1), 1.0)], lr=1, weight_decay=0, warmup_steps=0, max_steps=1, optimiser=name, betas=(0.5, 0.9)
    )
    assert type(made) is kind
    assert made.param_groups[0]["betas"] == (0.5, 0.9)


def test_a_run_shorter_than_its_warm_up_still_has_rates() -> None:
    assert rates(10, 4) == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_matrices_decay_and_vectors_do_not() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    adamw, _ = build_optimiser([(module, 1.0)], lr=0.1, weight_decay=0.3, warmup_steps=0, max_steps=9)
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in module.named_parameters()} == {
        "0.weight": 0.3,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
        "2.weight": 0.3,
        "2.bias": 0.0,
    }


def test_each_module_has_its_share_of_the_rate_and_frozen_parameters_none() -> None:
    slow, fast, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    adamw, schedule = build_optimiser(
        [(slow, 0.1), (fast, 1.0), (frozen, 1.0)], lr=0.5, weight_decay=0.1, warmup_steps=2, max_steps=9
    )
    held = {id(p): group for group in adamw.param_groups for p in group["params"]}
    assert len(held) == 4
    assert held[id(slow.weight)]["lr"] == pytest.approx(0.5 * 0.1 * 0.5)
    assert held[id(fast.bias)]["lr"] == pytest.approx(0.5 * 0.5)
    adamw.step(), schedule.step()
    assert held[id(slow.weight)]["lr"] == pytest.approx(0.1 * held[id(fast.weight)]["lr"])


def test_a_gradient_step_goes_down() -> None:
    parameter = nn.Linear(3, 1)
    adamw, _ = build_optimiser([(parameter, 1.0)], lr=0.01, weight_decay=0, warmup_steps=0, max_steps=9)
    image = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        loss = parameter(image).square().mean()
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
    assert losses == sorted(losses, reverse=True)
