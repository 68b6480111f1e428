"""Run one cell of a study, or find that it is whole already."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.config import FinetuneConfig
from medim.data.index.index import Record
from medim.data.loading.cohort import Cohort
from medim.evaluation.probing.label_budget import Budget, Sample
from medim.evaluation.probing.probe import probe
from medim.files import read_json
from medim.study.design import Cell, Design
from medim.study.lr_selection import METRIC, cut
from medim.training.finetune.run import finetune

SUMMARY = "summary.json"
PROBE = "probe.json"


@dataclass(frozen=True)
class Bench:
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
    subsets: dict[tuple[Budget, int], tuple[Record, ...]]
    parent_run: str | None = None
    accelerator: str = "auto"
    keep_models: bool = False

    def done(self, cell: Cell) -> bool:
        """Whether a cell is whole."""
        return (self.out / cell.folder / (PROBE if cell.kind == "probe" else SUMMARY)).is_file()

    def schedule(self, cell: Cell, multiple: float) -> FinetuneConfig:
        """The configuration of a cell: what the arms share, at this multiple of its learning rate."""
        changed: dict[str, Any] = {"lr": self.config.lr * multiple, "measure_at": self.design.measure_at}
        if cell.kind == "selection":
            changed["measure_at"] = ()
        if cell.arm.protocol == "frozen":
            changed["pretrained_lr_scale"] = 0.0
        return self.config.model_copy(update=changed)


def run_cell(bench: Bench, cell: Cell, multiple: float) -> None:
    """Run a cell from where it was left; what it wrote is then whole, and small.

    Args:
        bench: what all cells share.
        cell: which.
        multiple: of the preset's learning rate.

    Raises:
        UserError: as `medim.training.finetune.run.finetune` and `medim.evaluation.probing.probe.probe` say.
        StoppedError: SIGTERM came, and the step it came in is saved.
    """
    out = bench.out / cell.folder
    keep = bench.keep_models or _shown(bench, cell)
    if not bench.done(cell):
        with _quietly():
            if cell.kind == "probe":
                _probe(bench, cell, out)
            else:
                _finetune(bench, cell, out, multiple, reference=keep)
    if cell.kind != "probe":
        _tidy(out, keep_model=keep)


def score_of(bench: Bench, cell: Cell) -> float | None:
    """What a whole selection run reached on the labels that it held out."""
    value: float | None = summary_of(bench, cell)["val"]["metrics"][METRIC[bench.design.task]]["value"]
    return value


def summary_of(bench: Bench, cell: Cell) -> dict[str, Any]:
    """What a whole cell says of itself."""
    return read_json(bench.out / cell.folder / (PROBE if cell.kind == "probe" else SUMMARY))


def _finetune(bench: Bench, cell: Cell, out: Path, multiple: float, *, reference: bool) -> None:
    assert cell.budget is not None
    budget: dict[str, Any] = {"labelled": cell.budget.labelled, "label_fraction": cell.budget.fraction}
    cohort = bench.cohort
    if cell.kind == "selection":
        cohort, budget = cut(cohort, bench.subsets[cell.budget, cell.subset_seed]), {}
    finetune(
        bench.schedule(cell, multiple),
        cohort.index,
        out,
        encoder=cell.arm.runs[cell.pretrain_seed] if cell.arm.runs else None,
        seed=cell.pretrain_seed,
        subset_seed=cell.subset_seed,
        split_seed=bench.design.split_seed,
        resume=True,
        accelerator=bench.accelerator,
        cohort=cohort,
        parent_run=bench.parent_run,
        reference=reference,
        **budget,
    )


def _probe(bench: Bench, cell: Cell, out: Path) -> None:
    design, cohort = bench.design, bench.cohort
    train, val = cohort.records("train"), cohort.records("val")
    labels = {record.label for record in train}
    sample = Sample(
        store=cohort.store,
        keys=cohort.keys,
        train=train,
        labelled=train,
        val=val,
        classes=tuple(name for name in cohort.index.labels if name in labels),
        cases=tuple(cohort.cases(val)),
        overlap=cohort.overlap,
        rejected=len(cohort.rejected),
    )
    first = next(arm for arm in design.arms if design.probed(arm))
    anchors = cell.arm == first and cell.pretrain_seed == 0  # they know of no pretraining: once a study
    options: dict[str, Any] = {"split_seed": design.split_seed, "anchors": anchors, "sample": sample}
    options |= {"budgets": design.budgets, "seeds": design.draws(cell.arm), "overwrite": True}
    probe(cell.arm.runs[cell.pretrain_seed], cohort.index, out, **options)


def _shown(bench: Bench, cell: Cell) -> bool:
    """Whether the report shows this model's worst cases: an arm's first cell of the largest budget."""
    first = (cell.pretrain_seed, cell.subset_seed) == (0, 0)
    return first and cell.kind == "finetune" and cell.budget == bench.design.budgets[-1]


def _tidy(out: Path, *, keep_model: bool) -> None:
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "split.csv").unlink(missing_ok=True)  # the study has one for each subset seed
    if not keep_model:
        shutil.rmtree(out / "model", ignore_errors=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Let no cell talk: a study says a line a cell."""
    log = logging.getLogger("medim")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
