"""Run one cell of a study, or find that it is whole already."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig
from medim.data.index.index import ImageRecord
from medim.data.loading.cohort import Cohort
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import probe
from medim.files import read_json
from medim.study.design import Cell, Design
from medim.study.lr_selection import selection_cohort
from medim.tasks import find_task
from medim.training.finetune.options import FinetuneOptions
from medim.training.finetune.run import finetune

SUMMARY = "summary.json"
PROBE = "probe.json"


@dataclass(frozen=True)
class StudyContext:
    """What all cells of a study share; it travels to the worker processes once.

    Attributes:
        out: the study's folder.
        design: the study.
        config: the schedule of every arm.
        cohort: the images, preprocessed and split.
        subsets: the labels of each budget and subset seed.
        parent_run: MLflow's id of the study.
        accelerator: Lightning's name of the device kind.
        keep_models: keep the weights of every cell.
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
        """Whether a cell is whole."""
        return (self.out / cell.folder / (PROBE if cell.kind == "probe" else SUMMARY)).is_file()

    def config_for(self, cell: Cell, lr_multiplier: float) -> FinetuneConfig:
        """The configuration of a cell: what the arms share, at this multiple of its learning rate."""
        updates: dict[str, Any] = {"lr": self.config.lr * lr_multiplier, "measure_at": self.design.measure_at}
        if cell.kind == "selection":
            updates["measure_at"] = ()
        if cell.arm.protocol == "frozen":
            updates["pretrained_lr_scale"] = 0.0
        return self.config.model_copy(update=updates)


def run_cell(context: StudyContext, cell: Cell, lr_multiplier: float) -> None:
    """Run a cell from where it was left; what it wrote is then whole, and small.

    Args:
        context: what all cells share.
        cell: which.
        lr_multiplier: of the preset's learning rate.

    Raises:
        UserError: as `medim.training.finetune.run.finetune` and `medim.evaluation.probing.probe.probe` say.
        StoppedError: SIGTERM came, and the step it came in is saved.
    """
    out = context.out / cell.folder
    keep_model = context.keep_models or _keeps_model(context, cell)
    if not context.is_complete(cell):
        with _warnings_only():
            if cell.kind == "probe":
                _run_probe_cell(context, cell, out)
            else:
                _run_finetune_cell(context, cell, out, lr_multiplier, reference=keep_model)
    if cell.kind != "probe":
        _remove_intermediate_files(out, keep_model=keep_model)


def read_selection_score(context: StudyContext, cell: Cell) -> float | None:
    """What a whole selection run reached on the labels that it held out."""
    metrics = read_cell_summary(context, cell)["val"]["metrics"]
    value: float | None = metrics[find_task(context.design.task).metric]["value"]
    return value


def read_cell_summary(context: StudyContext, cell: Cell) -> dict[str, Any]:
    """What a whole cell says of itself."""
    return read_json(context.out / cell.folder / (PROBE if cell.kind == "probe" else SUMMARY))


def _run_finetune_cell(context: StudyContext, cell: Cell, out: Path, lr_multiplier: float, *, reference: bool) -> None:
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
        reference=reference,
    )
    if cell.kind == "selection":
        cohort = selection_cohort(context.cohort, context.subsets[cell.budget, cell.subset_seed])
        options = replace(options, cohort=cohort, labelled=None, label_fraction=None)
    finetune(context.config_for(cell, lr_multiplier), context.cohort.index, out, options)


def _run_probe_cell(context: StudyContext, cell: Cell, out: Path) -> None:
    design = context.design
    first_arm = next(arm for arm in design.arms if design.is_probe_arm(arm))
    anchors = cell.arm == first_arm and cell.pretrain_seed == 0  # they know of no pretraining: once a study
    options: dict[str, Any] = {"split_seed": design.split_seed, "anchors": anchors, "cohort": context.cohort}
    options |= {"budgets": design.budgets, "seeds": design.subset_seeds(cell.arm), "overwrite": True}
    probe(cell.arm.runs[cell.pretrain_seed], context.cohort.index, out, **options)


def _keeps_model(context: StudyContext, cell: Cell) -> bool:
    """Whether the report shows this model's worst cases: an arm's first cell of the largest budget."""
    is_first_cell = (cell.pretrain_seed, cell.subset_seed) == (0, 0)
    return is_first_cell and cell.kind == "finetune" and cell.budget == context.design.budgets[-1]


def _remove_intermediate_files(out: Path, *, keep_model: bool) -> None:
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "split.csv").unlink(missing_ok=True)  # the study has one for each subset seed
    if not keep_model:
        shutil.rmtree(out / "model", ignore_errors=True)


@contextmanager
def _warnings_only() -> Iterator[None]:
    """Let no cell talk: a study says a line a cell."""
    log = logging.getLogger("medim")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
