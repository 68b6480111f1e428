"""Which step's weights a run leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from medim.training.pretrain.checkpoint_selection import CheckpointSelection, Criterion


class Numbered(nn.Module):
    """Weights that say at which step they were."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.zeros(1))


def chosen(scores: Sequence[float], error: float, by: Criterion = "probe") -> tuple[CheckpointSelection, Numbered]:
    selection, module = CheckpointSelection(by), Numbered()
    for step, score in enumerate(scores, start=1):
        nn.init.constant_(module.step, step)
        selection.update(step, score, error, {"probe": score}, module)
    return selection, module


@pytest.mark.parametrize(
    ("scores", "error", "step"),
    [
        ([0.6, 0.7, 0.8], 0.05, 3),
        ([0.6, 0.9, 0.87], 0.05, 3),  # worse, but within the best one's error: the last step wins
        ([0.6, 0.9, 0.8], 0.05, 2),
        ([0.9, 0.87, 0.7], 0.05, 2),  # the latest of those as good as the best
        ([0.9, 0.9, 0.9], 0.0, 3),
        ([0.6, math.nan, math.nan], 0.05, 1),  # collapsed since
    ],
)
def test_the_latest_step_within_one_error_of_the_best_is_kept(scores: list[float], error: float, step: int) -> None:
    selection, module = chosen(scores, error)
    selection.restore(module, last_step=3)
    assert selection.step == step == module.step.item()
    told = selection.summary(3)
    assert (told["step"], told["criterion"], told["last_step"]) == (step, "probe", 3)
    assert told["metrics"]["probe"] == scores[step - 1]


def test_where_nothing_could_be_kept_the_last_step_is_left_and_said() -> None:
    selection, module = chosen([math.nan, math.nan], 0.1)
    selection.restore(module, last_step=2)
    assert module.step.item() == 2
    assert (selection.summary(2)["criterion"], selection.summary(2)["best_step"]) == ("last_step", None)
    assert selection.summary(2)["reason"] == "no validated step without collapse; the last step is saved"


def test_a_selection_lives_through_a_checkpoint(tmp_path: Path) -> None:
    selection, module = chosen([0.9, 0.5], 0.05)
    torch.save(selection.state_dict(), tmp_path / "state.ckpt")
    again = CheckpointSelection("probe")
    again.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    again.update(3, 0.8, 0.05, {}, module)
    again.restore(module, last_step=3)
    assert again.summary(3) == selection.summary(3)
    assert module.step.item() == 1
