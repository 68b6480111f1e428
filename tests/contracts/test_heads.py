"""What every entry of HEADS promises, in 2D and 3D: logits, and a loss that falls towards the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from medim.config import build_from_section
from medim.models.heads import HEADS, LinearProbe, MultiLabelHead, RegressionHead
from medim.models.serialization import load_weights, save_model
from medim.types import Features

CLASSES = 3
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "classification": [
        {},
        {"maps": [0, 1]},
        {"maps": [-1]},
        {"hidden": [7, 6]},
        {"class_weights": [0.5, 1.0, 1.5], "focal_gamma": 0.5},
    ],
    "segmentation": [{}, {"dice": "image", "class_weights": [0.2, 1.0, 1.8], "focal_gamma": 2.0}],
    "multi_label": [{}, {"maps": [-1], "hidden": [7]}],
}
GRIDS: dict[int, tuple[int, ...]] = {2: (8, 6), 3: (8, 6, 4)}
every_head = pytest.mark.parametrize(
    ("section", "dims"),
    [
        pytest.param({"name": name, **options}, dims, id=f"{name}-{n}-{dims}d")
        for name in HEADS
        for n, options in enumerate(VARIANTS.get(name, [{}]))
        for dims in (2, 3)
    ],
)


def make(section: dict[str, Any], dims: int) -> Any:
    torch.manual_seed(0)
    head = build_from_section(
        HEADS, section, channels=(4, 6), summary_channels=5, spatial_dims=dims, out_channels=CLASSES
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def features(dims: int) -> Features:
    generator = torch.Generator().manual_seed(1)
    half = tuple(side // 2 for side in GRIDS[dims])
    maps = (torch.randn(4, 4, *GRIDS[dims], generator=generator), torch.randn(4, 6, *half, generator=generator))
    return Features(maps, torch.randn(4, 5, generator=generator))


def is_derived_from(section: dict[str, Any], kind: type) -> bool:
    """Whether a head learns from the targets of another head: numbers, or findings; others learn classes."""
    head: Any = HEADS[section["name"]]
    return isinstance(head, type) and issubclass(head, kind)


def target_of(section: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """Classes, each of which occurs; for findings, one an image is present and the others are absent."""
    shape = (len(logits), *logits.shape[2:])
    target = torch.randint(0, CLASSES, shape, generator=torch.Generator().manual_seed(2))
    target.view(-1)[:CLASSES] = torch.arange(CLASSES)
    if is_derived_from(section, RegressionHead):
        return 3 * one_hot(target, CLASSES).float()
    return one_hot(target, CLASSES).float() if is_derived_from(section, MultiLabelHead) else target


@every_head
def test_logits_have_a_channel_a_class(section: dict[str, Any], dims: int) -> None:
    logits = make(section, dims)(features(dims))
    assert logits.shape[:2] == (4, CLASSES)
    assert logits.shape[2:] in ((), GRIDS[dims])


@every_head
def test_the_loss_is_a_scalar_whose_gradient_reaches_every_parameter(section: dict[str, Any], dims: int) -> None:
    head = make(section, dims)
    logits = head(features(dims))
    loss = head.loss(logits, target_of(section, logits))
    assert loss.shape == ()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@every_head
def test_certainty_of_the_truth_costs_nothing_and_of_an_error_much(section: dict[str, Any], dims: int) -> None:
    head = make(section, dims)
    target = target_of(section, head(features(dims)))
    if is_derived_from(section, RegressionHead):
        right = target
    else:
        right = 100 * target - 50 if target.is_floating_point() else 50.0 * one_hot(target, CLASSES).movedim(-1, 1)
    even = torch.zeros_like(right)
    assert head.loss(right, target) < 1e-3
    assert max(0.01, 10 * head.loss(right, target)) < head.loss(even, target)
    assert head.loss(even, target) < head.loss(right.roll(1, dims=1), target)


@every_head
def test_reordering_a_batch_changes_no_loss(section: dict[str, Any], dims: int) -> None:
    head = make(section, dims)
    logits = head(features(dims))
    target, order = target_of(section, logits), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(head.loss(logits[order], target[order]), head.loss(logits, target))


@every_head
def test_the_loss_is_fp32_under_bf16(section: dict[str, Any], dims: int) -> None:
    head = make(section, dims)
    exact = head(features(dims))
    target = target_of(section, exact)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(head(features(dims)), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, head.loss(exact, target), rtol=0.05, atol=0.05)


@every_head
def test_a_saved_head_comes_back_bit_for_bit(section: dict[str, Any], dims: int, tmp_path: Path) -> None:
    head = make(section, dims)
    head(features(dims))
    save_model(tmp_path, "head", head, {"kind": "head"})
    again = make(section, dims)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_weights(again, tmp_path / "head.safetensors")
    assert torch.equal(again.eval()(features(dims)), head.eval()(features(dims)))


@every_head
def test_a_head_that_starts_from_a_probe_answers_as_the_probe(section: dict[str, Any], dims: int) -> None:
    head = make(section, dims).eval()
    given = features(dims)
    inputs = head.inputs(given)
    width = inputs.shape[1]
    generator = torch.Generator().manual_seed(3)
    mean, weight = torch.randn(width, generator=generator), torch.randn(CLASSES, width, generator=generator)
    probe = LinearProbe(mean, torch.rand(width, generator=generator) + 0.5, weight, torch.arange(CLASSES).float())
    head.start_from(probe)
    rows = inputs.movedim(1, -1).reshape(-1, width)
    expected = ((rows - probe.mean) / probe.std) @ probe.weight.T + probe.bias
    torch.testing.assert_close(head(given).movedim(1, -1).reshape(-1, CLASSES).float(), expected, atol=1e-3, rtol=1e-3)
