"""Run one cell of a study, or detect that it is complete."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig
from medim.console.progress import shows_bars, titled_bars
from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import ProbeOptions, probe
from medim.migrations import read_migrated_json
from medim.study.design import Cell, Design
from medim.study.lr_selection import selection_cohort
from medim.tasks import find_task
from medim.training.finetune.options import FinetuneOptions
from medim.training.finetune.run import finetune

SUMMARY = "summary.json"
PROBE = "probe.json"


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """Data shared by all cells of a study; sent to each worker process once.

    Attributes:
        out: folder of the study.
        design: design of the study.
        config: configuration with the schedule of every arm.
        cohort: images, preprocessed and split.
        subsets: labelled images by budget and subset seed.
        parent_run: MLflow run id of the study.
        accelerator: device kind, in the terms of Lightning.
        keep_models: whether to keep the weights of every cell.
    """

    out: Path
    design: Design
    config: FinetuneConfig
    cohort: Cohort
    subsets: dict[tuple[Budget, int], tuple[ImageRecord, ...]]
    parent_run: str | None = None
    accelerator: str = "auto"
    keep_models: bool = False

    def is_complete(self, cell: Cell) -> bool:
        """Whether a cell is complete."""
        return (self.out / cell.folder / (PROBE if cell.kind == "probe" else SUMMARY)).is_file()

    def config_for(self, cell: Cell, lr_multiplier: float) -> FinetuneConfig:
        """Build the configuration of a cell: that of all arms, with the learning rate multiplied by a factor."""
        updates: dict[str, Any] = {"lr": self.config.lr * lr_multiplier, "eval_steps": self.design.eval_steps}
        if cell.kind == "selection":
            updates["eval_steps"] = ()
        if cell.arm.protocol == "frozen":
            updates["pretrained_lr_scale"] = 0.0
        return self.config.model_copy(update=updates)


def run_cell(context: StudyContext, cell: Cell, lr_multiplier: float) -> None:
    """Run a cell, or resume it, and remove its intermediate files.

    Args:
        context: data shared by all cells.
        cell: cell to run.
        lr_multiplier: factor on the learning rate of the preset.

    Raises:
        UserError: see `medim.training.finetune.run.finetune` and `medim.evaluation.probing.probe.probe`.
        StoppedError: SIGTERM arrived; the step in progress was saved.
    """
    out = context.out / cell.folder
    keep_model = context.keep_models or _keeps_model(context, cell)
    if not context.is_complete(cell):
        with _errors_only(str(cell)):
            if cell.kind == "probe":
                _run_probe_cell(context, cell, out)
            else:
                _run_finetune_cell(context, cell, out, lr_multiplier, fit_ood_detector=keep_model)
    if cell.kind != "probe":
        _remove_intermediate_files(out, keep_model=keep_model)


def read_selection_score(context: StudyContext, cell: Cell) -> float | None:
    """Read the metric of a complete selection run on its validation labels."""
    metrics = read_cell_summary(context, cell)["val"]["metrics"]
    value: float | None = metrics[context.design.primary_metric]["value"]
    return value


def read_cell_summary(context: StudyContext, cell: Cell) -> dict[str, Any]:
    """Read the summary of a complete cell."""
    return read_migrated_json(context.out / cell.folder / (PROBE if cell.kind == "probe" else SUMMARY), "run")


def _run_finetune_cell(
    context: StudyContext, cell: Cell, out: Path, lr_multiplier: float, *, fit_ood_detector: bool
) -> None:
    assert cell.budget is not None
    options = FinetuneOptions(
        encoder=cell.arm.runs[cell.pretrain_seed] if cell.arm.runs else None,
        labelled=cell.budget.labelled,
        label_fraction=cell.budget.fraction,
        seed=cell.pretrain_seed,
        subset_seed=cell.subset_seed,
        split_seed=context.design.split_seed,
        resume=True,
        accelerator=context.accelerator,
        cohort=context.cohort,
        parent_run=context.parent_run,
        fit_ood_detector=fit_ood_detector,
    )
    if cell.kind == "selection":
        cohort = selection_cohort(context.cohort, context.subsets[cell.budget, cell.subset_seed])
        options = replace(options, cohort=cohort, labelled=None, label_fraction=None)
    finetune(context.config_for(cell, lr_multiplier), context.cohort.index, out, options)


def _run_probe_cell(context: StudyContext, cell: Cell, out: Path) -> None:
    design = context.design
    first_arm = next(arm for arm in design.arms if design.is_probe_arm(arm))
    options = ProbeOptions(
        protocol=find_task(design.task).probe or "",
        budgets=design.budgets,
        seeds=design.subset_seeds(cell.arm),
        split_seed=design.split_seed,
        baselines=cell.arm == first_arm and cell.pretrain_seed == 0,  # independent of pretraining: once per study
        overwrite=True,
        cohort=context.cohort,
        device=context.accelerator,
    )
    probe(cell.arm.runs[cell.pretrain_seed], context.cohort.index, out, options)


def _keeps_model(context: StudyContext, cell: Cell) -> bool:
    """Whether the report shows the worst cases of this model: the first cell of an arm at the largest budget."""
    is_first_cell = (cell.pretrain_seed, cell.subset_seed) == (0, 0)
    return is_first_cell and cell.kind == "finetune" and cell.budget == context.design.budgets[-1]


def remove_leftovers(context: StudyContext, cells: Iterable[Cell]) -> None:
    """Remove the intermediate files of complete cells, which a kill after the end of a cell leaves."""
    for cell in cells:
        if cell.kind != "probe" and context.is_complete(cell):
            keep_model = context.keep_models or _keeps_model(context, cell)
            _remove_intermediate_files(context.out / cell.folder, keep_model=keep_model)


def _remove_intermediate_files(out: Path, *, keep_model: bool) -> None:
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "split.csv").unlink(missing_ok=True)  # the study has one file per subset seed
    if not keep_model:
        shutil.rmtree(out / "model", ignore_errors=True)


@contextmanager
def _errors_only(title: str) -> Iterator[None]:
    """Suppress log messages below ERROR while a cell runs; the study logs one line per cell.

    On the terminal of a study that runs its cells in this process, the progress of the cell is shown under `title`.
    """
    log = logging.getLogger("medim")
    level = log.level
    shows_cell = shows_bars()
    log.setLevel(logging.ERROR)
    try:
        with titled_bars(title) if shows_cell else nullcontext():
            yield
    finally:
        log.setLevel(level)
