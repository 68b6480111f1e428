from __future__ import annotations

from pathlib import Path

import pytest

from medim.data.index.index import ImageRecord
from medim.evaluation.probing.label_budget import Budget
from medim.study.design import Arm, Cell, Design, read_arms
from medim.types import UsageError

FEW, ALL = Budget(labelled=4), Budget(fraction=1.0)
SUBSETS: dict[tuple[Budget, int], tuple[ImageRecord, ...]] = {(FEW, 0): (), (FEW, 1): (), (ALL, 0): ()}


def design(*names: str, **options: object) -> Design:
    arms = (Arm("scratch"), *(Arm(name, (Path("a"), Path("b"))) for name in names))
    return Design(task="classification", arms=arms, budgets=(FEW, ALL), seeds=2, **options)  # type: ignore[arg-type]


def test_arms_are_read_with_their_runs_and_scratch_is_always_first() -> None:
    arms = read_arms(["dim=a,b", "vae=c"], ["frozen=a"])
    assert [(arm.name, arm.runs, arm.protocol) for arm in arms] == [
        ("scratch", (), "finetune"),
        ("dim", (Path("a"), Path("b")), "finetune"),
        ("vae", (Path("c"),), "finetune"),
        ("frozen", (Path("a"),), "frozen"),
    ]


@pytest.mark.parametrize(
    ("encoders", "message"),
    [
        ([], "expected NAME=RUN"),
        (["runs/a"], "expected NAME=RUN"),
        (["dim="], "expected NAME=RUN"),
        (["dim=a,"], "expected NAME=RUN"),
        (["../x=a"], "expected a name"),
        (["scratch=a"], "another arm"),
        (["pixels=a"], "another arm"),
        (["dim=a", "dim=b"], "another arm"),
    ],
)
def test_an_arm_that_cannot_be_told_apart_is_refused(encoders: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_arms(encoders)


def test_every_run_of_an_arm_has_a_scratch_run_of_the_same_seed_budget_and_subset() -> None:
    cells = design("dim").list_cells(SUBSETS)
    keys = {
        name: {(c.pretrain_seed, c.budget, c.subset_seed) for c in cells if c.arm.name == name}
        for name in ("dim", "scratch")
    }
    assert keys["dim"] == keys["scratch"]
    assert len(keys["dim"]) == 2 * 3


def test_a_budget_of_all_labels_has_one_subset() -> None:
    cells = design("dim").list_cells(SUBSETS)
    assert {c.subset_seed for c in cells if c.budget == ALL} == {0}
    assert {c.subset_seed for c in cells if c.budget == FEW} == {0, 1}


def test_the_first_cells_are_a_whole_study_of_one_seed_and_subset() -> None:
    cells = design("dim", "vae").list_cells(SUBSETS)
    assert [(c.budget, c.arm.name, c.pretrain_seed, c.subset_seed) for c in cells[:6]] == [
        (budget, name, 0, 0) for budget in (FEW, ALL) for name in ("scratch", "dim", "vae")
    ]


def test_a_rate_is_chosen_once_an_arm_and_budget_and_right_before_it_is_needed() -> None:
    chosen = frozenset({("scratch", "100%"), ("dim", "100%")})
    cells = design("dim", lr_selections=chosen).list_cells(SUBSETS)
    trials = [c for c in cells if c.kind == "selection"]
    assert [(c.arm.name, c.lr_multiplier) for c in trials] == [
        (n, m) for n in ("scratch", "dim") for m in (0.3, 1.0, 3.0)
    ]
    for trial in trials:
        first = next(c for c in cells if c.kind == "finetune" and (c.arm, c.budget) == (trial.arm, trial.budget))
        assert cells.index(trial) < cells.index(first)


def test_a_frozen_classifier_is_one_probe_a_run_and_a_frozen_segmenter_is_trained() -> None:
    arms = (Arm("scratch"), Arm("dim", (Path("a"), Path("b")), "frozen"))
    kinds = {}
    for task in ("classification", "segmentation"):
        cells = Design(task=task, arms=arms, budgets=(FEW, ALL), seeds=2).list_cells(SUBSETS)
        kinds[task] = [c.kind for c in cells if c.arm.name == "dim"]
    assert kinds["classification"] == ["probe"] * 2
    assert kinds["segmentation"] == ["finetune"] * 6


def test_frozen_arms_can_be_given_fewer_subsets_than_the_arms_that_a_study_is_about() -> None:
    arms = (Arm("scratch"), Arm("dim", (Path("a"),)), Arm("vae", (Path("b"),), "frozen"))
    cells = Design(task="segmentation", arms=arms, budgets=(FEW, ALL), seeds=2, probe_seeds=1).list_cells(SUBSETS)
    drawn = {name: sum(c.arm.name == name and c.budget == FEW for c in cells) for name in ("scratch", "dim", "vae")}
    assert drawn == {"scratch": 2, "dim": 2, "vae": 1}
    assert Design(task="segmentation", arms=arms, budgets=(FEW,), seeds=2, probe_seeds=9).subset_seeds(
        arms[2]
    ) == range(2)


def test_no_two_cells_share_a_folder() -> None:
    arms = (Arm("scratch"), Arm("dim", (Path("a"), Path("b"))), Arm("frozen", (Path("a"),), "frozen"))
    chosen = frozenset({("scratch", "4"), ("dim", "4")})
    cells = Design(task="classification", arms=arms, budgets=(FEW, ALL), seeds=2, lr_selections=chosen).list_cells(
        SUBSETS
    )
    assert len({cell.folder for cell in cells}) == len(cells) == len({str(cell) for cell in cells})
    assert Cell(arms[1], 1, FEW, 0).folder == Path("cells/dim/4/1-0")
