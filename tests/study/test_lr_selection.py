from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medim.config import FinetuneConfig
from medim.data.index.index import Index
from medim.data.loading.cohort import Cohort
from medim.evaluation.probing.label_budget import Budget
from medim.study.cell import StudyContext, read_selection_score, run_cell
from medim.study.design import Arm, Cell, Design
from medim.study.lr_selection import best_multiplier, describe_subset_shortage, selection_cohort, split_subset
from medim.training.finetune.run import finetune, open_labelled_cohort

BUDGET = Budget(labelled=20)
GRID = (0.01, 1.0)


@pytest.fixture(scope="module")
def cohort(index: Index, schedule: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return open_labelled_cohort(schedule, index, split_seed=0, store=tmp_path_factory.mktemp("store"))


def test_a_fifth_of_the_budget_is_held_out_by_whole_subjects(cohort: Cohort) -> None:
    subset = [replace(r, subject=f"s{n // 2}") for n, r in enumerate(BUDGET.draw_subset(cohort.records("train"), 0))]
    train, held = split_subset(subset)
    assert (len(train), len(held)) == (16, 4)
    assert not {r.subject for r in train} & {r.subject for r in held}
    assert {r.image for r in (*train, *held)} == {r.image for r in subset}


def test_what_is_too_small_to_choose_by_is_told(cohort: Cohort) -> None:
    records = cohort.records("train")
    assert describe_subset_shortage("classification", BUDGET.draw_subset(records, 0)) is None
    assert "4 labelled images, but 10" in (describe_subset_shortage("classification", records[:4]) or "")
    few = [r for r in records if r.label == "up"][:14] + [r for r in records if r.label == "down"][:2]
    assert "fewer than 2 images of down" in (describe_subset_shortage("classification", few) or "")
    one = [replace(r, subject="one") for r in records[:20]]
    assert "of one subject" in (describe_subset_shortage("segmentation", one) or "")


def test_the_best_score_wins_and_of_equals_the_one_nearest_to_the_preset() -> None:
    assert best_multiplier({0.3: 0.7, 1.0: 0.8, 3.0: 0.9}) == 3.0
    assert best_multiplier({0.3: 0.9, 1.0: 0.9, 3.0: 0.9}) == 1.0
    assert best_multiplier({0.3: 0.0, 1.0: None, 3.0: None}) == 0.3
    assert best_multiplier({0.3: None, 1.0: None, 3.0: None}) == 1.0
    assert best_multiplier({0.3: 0.7, 1.0: None, 3.0: 0.9}, higher_is_better=False) == 0.3


def planted(cohort: Cohort) -> Cohort:
    """The cohort with an evaluation split in which what is right is wrong."""
    held = {r.image for r in cohort.records("val")}
    other = {"up": "down", "down": "up"}
    records = tuple(replace(r, label=other[str(r.label)]) if r.image in held else r for r in cohort.index.records)
    return replace(cohort, index=replace(cohort.index, records=records))


def test_an_evaluation_split_in_which_another_rate_would_win_changes_no_choice(
    cohort: Cohort, schedule: FinetuneConfig, encoders: list[Path], tmp_path: Path
) -> None:
    arm = Arm("dim", (encoders[0],))
    design = Design(task="classification", arms=(Arm("scratch"), arm), budgets=(BUDGET,), seeds=1, lr_multipliers=GRID)
    config = schedule.model_copy(update={"max_steps": 12, "head_init": "random"})
    chosen, would_be = [], []
    for name, images in (("as it is", cohort), ("planted", planted(cohort))):
        subsets = {(BUDGET, 0): BUDGET.draw_subset(images.records("train"), 0)}
        bench = StudyContext(
            out=tmp_path / name, design=design, config=config, cohort=images, subsets=subsets, accelerator="cpu"
        )
        cells = {m: Cell(arm, 0, BUDGET, lr_multiplier=m) for m in GRID}
        for m, cell in cells.items():
            run_cell(bench, cell, m)
        chosen.append({m: read_selection_score(bench, cell) for m, cell in cells.items()})
        measured: dict[float, Any] = {}
        for m in GRID:
            out = tmp_path / f"{name} {m}"
            rate = config.model_copy(update={"lr": config.lr * m})
            measured[m] = finetune(rate, images.index, out, encoder=encoders[0], labelled=20, cohort=images)["val"]
        would_be.append(best_multiplier({m: found["metrics"]["auroc"]["value"] for m, found in measured.items()}))
    assert chosen[0] == chosen[1]
    assert would_be[0] != would_be[1]


def test_selection_is_given_nothing_but_the_budget(cohort: Cohort) -> None:
    subset = BUDGET.draw_subset(cohort.records("train"), 0)
    small = selection_cohort(cohort, subset)
    assert set(small.keys) == {r.image for r in subset}
    train, held = split_subset(subset)
    assert (small.records("train"), small.records("val"), small.records("test")) == (train, held, ())


@pytest.mark.slow
def test_the_rate_that_was_chosen_is_used_and_the_whole_grid_is_told(
    run_study: Callable[..., dict[str, Any]], tmp_path: Path, encoders: list[Path]
) -> None:
    arms = (Arm("scratch"), Arm("dim", (encoders[0],)))
    summary = run_study(arms=arms, budgets=(Budget(labelled=4), BUDGET), seeds=1, lr_multipliers=None)
    rates = summary["learning_rates"]["dim"]
    assert (rates["4"]["from"], rates["4"]["lr"], rates["4"]["scores"]) == ("fixed", 0.01, {})
    scores = {float(m): score for m, score in rates["20"]["scores"].items()}
    assert list(scores) == [0.3, 1.0, 3.0]
    assert (rates["20"]["from"], rates["20"]["multiple"]) == ("selection", best_multiplier(scores))
    config = (tmp_path / "study" / "cells" / "dim" / "20" / "0-0" / "config.yaml").read_text()
    assert f"lr: {0.01 * best_multiplier(scores)}\n" in config
    assert summary["no_lr_selection"] == {"4": "it has 4 labelled images, but 10 are needed"}
