"""What a study runs: arms, label budgets, and the cells in the order in which they are begun."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medim.data.index.index import ImageRecord
from medim.evaluation.probing.label_budget import Budget
from medim.types import UsageError

ArmProtocol = Literal["finetune", "frozen"]
StudyTask = Literal["segmentation", "classification"]
CellKind = Literal["finetune", "selection", "probe"]
LabelSubsets = Mapping[tuple[Budget, int], tuple[ImageRecord, ...]]  # the images of each budget and subset seed

SCRATCH = "scratch"
UNTRAINED, PIXELS = "untrained", "pixels"  # the anchors of frozen probes
LR_MULTIPLIERS = (0.3, 1.0, 3.0)  # of the preset's learning rate


@dataclass(frozen=True)
class Arm:
    """One way to begin, with one run a pretraining seed.

    Attributes:
        name: `init` in the results.
        runs: pretraining runs or packages; empty for the scratch twin.
        protocol: fine-tuned, or frozen under a probe.
    """

    name: str
    runs: tuple[Path, ...] = ()
    protocol: ArmProtocol = "finetune"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        arm: how it begins.
        pretrain_seed: place in the arm's runs; the scratch twin's own weights have it as their seed.
        budget: how many labels; None: a probe, which measures all budgets and subsets on features computed once.
        subset_seed: of the draw of the labels.
        lr_multiplier: a selection run, with this multiple of the preset's learning rate; None: a run that is measured.
    """

    arm: Arm
    pretrain_seed: int
    budget: Budget | None = None
    subset_seed: int = 0
    lr_multiplier: float | None = None

    @property
    def kind(self) -> CellKind:
        """What is done."""
        return "probe" if self.budget is None else "finetune" if self.lr_multiplier is None else "selection"

    @property
    def folder(self) -> Path:
        """Where it is done, in the study's folder."""
        budget = self.budget.name if self.budget else ""
        if self.lr_multiplier is not None:
            return Path("selection", self.arm.name, budget, f"{self.lr_multiplier:g}")
        name = f"{self.pretrain_seed}-{self.subset_seed}" if self.budget else f"probe-{self.pretrain_seed}"
        return Path("cells", self.arm.name, budget, name)

    def __str__(self) -> str:
        """For people."""
        if self.budget is None:
            return f"{self.arm.name}, probe, encoder {self.pretrain_seed}"
        if self.lr_multiplier is not None:
            return f"{self.arm.name}, {self.budget.name} labels, learning rate x {self.lr_multiplier:g}"
        return f"{self.arm.name}, {self.budget.name} labels, encoder {self.pretrain_seed}, subset {self.subset_seed}"


@dataclass(frozen=True)
class Design:
    """A whole study.

    Attributes:
        task: what is learnt.
        arms: the scratch twin first.
        budgets: how many labels, fewest first.
        seeds: label subsets a budget.
        split_seed: of the split by subject.
        lr_multipliers: of the preset's learning rate, to choose from; a single one chooses nothing.
        lr_selections: names of the arms and budgets for which a learning rate is chosen.
        measure_at: steps after which the evaluation split is measured on the way.
        probe_seeds: label subsets a budget of arms that stay frozen; None: as many as of the others.
    """

    task: StudyTask
    arms: tuple[Arm, ...]
    budgets: tuple[Budget, ...]
    seeds: int
    split_seed: int = 0
    lr_multipliers: tuple[float, ...] = LR_MULTIPLIERS
    lr_selections: frozenset[tuple[str, str]] = frozenset()
    measure_at: tuple[int, ...] = ()
    probe_seeds: int | None = None

    def is_probe_arm(self, arm: Arm) -> bool:
        """Whether an arm is measured by a linear probe; frozen segmentation trains a decoder instead."""
        return arm.protocol == "frozen" and self.task == "classification"

    def subset_seeds(self, arm: Arm) -> range:
        """Seeds of the label subsets that an arm learns from."""
        limit = self.probe_seeds if arm.protocol == "frozen" else None
        return range(min(self.seeds, limit or self.seeds))

    def list_cells(self, subsets: LabelSubsets) -> list[Cell]:
        """All cells, in an order that makes a study useful wherever it is stopped.

        One subset after the other, in it one pretraining seed after the other, the smallest budget first, and all arms
        side by side. A learning rate is chosen right before it is needed.
        """
        entries: list[tuple[tuple[int, int, int], Cell]] = []
        for arm in self.arms:
            for s in range(count_pretrain_seeds(arm, self.arms)):
                if self.is_probe_arm(arm):
                    entries.append(((0, s, -1), Cell(arm, s)))
                    continue
                for position, budget in enumerate(self.budgets):
                    if s == 0 and (arm.name, budget.name) in self.lr_selections:
                        entries += [
                            ((0, 0, position), Cell(arm, 0, budget, lr_multiplier=m)) for m in self.lr_multipliers
                        ]
                    own_seeds = [
                        t for subset_budget, t in subsets if subset_budget == budget and t in self.subset_seeds(arm)
                    ]
                    entries += [((t, s, position), Cell(arm, s, budget, t)) for t in own_seeds]
        return [cell for _, cell in sorted(entries, key=lambda pair: pair[0])]


def count_pretrain_seeds(arm: Arm, arms: Collection[Arm]) -> int:
    """Pretraining seeds of an arm; the scratch twin has as many as the arm with most, to be paired with each."""
    return len(arm.runs) or max(len(other.runs) for other in arms)


def read_arms(encoders: Sequence[str], probes: Sequence[str] = ()) -> tuple[Arm, ...]:
    """The arms of `--encoder NAME=RUN[,RUN2,...]` and `--frozen ...`, the scratch twin first.

    Raises:
        UsageError: none, another form, or a name that is taken or cannot name a folder.
    """
    arms = [Arm(SCRATCH)]
    for option, values, protocol in (("--encoder", encoders, "finetune"), ("--frozen", probes, "frozen")):
        for value in values:
            name, equals, runs = value.partition("=")
            if not equals or not all(runs.split(",")):
                raise UsageError(f"{option} {value}: expected NAME=RUN or NAME=RUN,RUN2,... with a name for the table.")
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise UsageError(f"{option} {value}: expected a name of letters, digits and . + - _, got {name!r}.")
            if name in {UNTRAINED, PIXELS, *(arm.name for arm in arms)}:
                raise UsageError(f"{option} {value}: {name!r} is the name of another arm; give each its own.")
            paths = tuple(Path(run) for run in runs.split(","))
            arms.append(Arm(name, paths, "finetune" if protocol == "finetune" else "frozen"))
    if len(arms) == 1:
        raise UsageError("--encoder: expected NAME=RUN, a pretraining run to hold against the scratch twin.")
    return tuple(arms)
