"""Every preset trains with the fused optimiser of a GPU in each precision, and clips gradients without a scale."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import medim.training.finetune.run as finetuning
from medim.models import heads
from medim.training.engine.trainer import make_trainer
from medim.training.finetune.module import FinetuneModule
from medim.training.pretrain.module import PretrainModule
from tests.training import one_step
from tests.training.one_step import HEAD_VARIANTS, list_cases, take_step

SEGMENTATION, PRETRAINING = "finetune mri-demo-segmentation", "pretrain test-2d-local-dim"


PRESETS_AND_HEADS = [case for case in list_cases() if case.count(" ") == 1 or case.partition(" ")[2] in HEAD_VARIANTS]


@pytest.mark.parametrize("case", PRESETS_AND_HEADS)
def test_a_step_of_every_preset_runs_in_bf16(case: str) -> None:
    assert all(weight.isfinite().all() for weight in take_step(case, "bf16-mixed").weights.values())


@pytest.mark.parametrize("case", list_cases())
def test_the_gradient_scaler_of_fp16_does_not_change_the_step(case: str) -> None:
    """Its scale is a power of two, and only the arithmetic of fp16 may change a result."""
    plain, scaled = take_step(case), take_step(case, "16-mixed")
    assert scaled.norms == plain.norms
    assert all(torch.equal(weight, plain.weights[name]) for name, weight in scaled.weights.items())
    assert scaled.scale == one_step.SCALE  # no overflow, which would have left out the step


@pytest.mark.parametrize("precision", one_step.PRECISIONS)
@pytest.mark.parametrize("case", [SEGMENTATION, PRETRAINING])
def test_a_step_is_as_long_as_the_clipped_gradient(case: str, precision: one_step.Precision) -> None:
    """A step of SGD with a rate of 1 is the gradient itself; Adam would hide a wrong length."""
    step = take_step(case, precision, sgd=True, lr=1.0, gradient_clip=0.01, weight_decay=0.0)
    length = torch.stack([(step.weights[name] - step.start[name]).norm() for name in step.start]).norm()
    assert length.item() == pytest.approx(0.01, rel=0.01)
    assert all(norm > 0.01 for norm in step.norms.values())


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_clipping_of_lightning_is_refused_with_a_fused_optimiser(
    precision: one_step.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clip_by_lightning(*args: Any, **options: Any) -> pl.Trainer:
        trainer = make_trainer(*args, **options)
        trainer.gradient_clip_val = 1.0
        return trainer

    monkeypatch.setattr(finetuning, "make_trainer", clip_by_lightning)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        take_step.__wrapped__(SEGMENTATION, precision)


@pytest.mark.parametrize(("case", "module"), [(SEGMENTATION, FinetuneModule), (PRETRAINING, PretrainModule)])
def test_clipping_of_scaled_gradients_is_found(case: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{module.__module__}.unscale_fused_gradients", lambda optimiser, scaler: None)
    plain, scaled = take_step(case), take_step.__wrapped__(case, "16-mixed")
    assert not all(torch.equal(weight, plain.weights[name]) for name, weight in scaled.weights.items())


@pytest.mark.parametrize("case", [SEGMENTATION, PRETRAINING])
def test_a_step_that_overflows_is_left_out(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first scale is usually too high; the scaler then lowers it."""
    monkeypatch.setattr(heads, "focal_cross_entropy", lambda logits, *_: 1e6 * logits.square().mean())
    step = take_step(case, "16-mixed", scale=2.0**127, max_steps=1)
    assert all(torch.equal(weight, step.start[name]) for name, weight in step.weights.items())
    assert step.scale == 2.0**126
