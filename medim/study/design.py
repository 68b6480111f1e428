"""Design of a study: arms, label budgets, and the cells in their order of execution."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medim.data.index.index import ImageRecord
from medim.evaluation.probing.label_budget import Budget
from medim.tasks import find_task
from medim.types import UsageError

ArmProtocol = Literal["finetune", "frozen"]
CellKind = Literal["finetune", "selection", "probe"]
LabelSubsets = Mapping[tuple[Budget, int], tuple[ImageRecord, ...]]  # images by budget and subset seed

SCRATCH = "scratch"
UNTRAINED, PIXELS = "untrained", "pixels"  # baseline arms of frozen probes
LR_MULTIPLIERS = (0.3, 1.0, 3.0)  # factors on the learning rate of the preset


@dataclass(frozen=True)
class Arm:
    """One initialisation, with one run per pretraining seed.

    Attributes:
        name: name of the arm, column `arm` of the results.
        runs: pretraining runs or packages; empty for the scratch arm.
        protocol: fine-tuned, or frozen with a probe.
    """

    name: str
    runs: tuple[Path, ...] = ()
    protocol: ArmProtocol = "finetune"


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        arm: initialisation.
        pretrain_seed: position in the runs of the arm; for the scratch arm the seed of its initial weights.
        budget: label budget; None for a probe, which evaluates all budgets and subsets on features computed once.
        subset_seed: random seed of the label subset.
        lr_multiplier: factor on the learning rate of the preset in a selection run; None for other runs.
    """

    arm: Arm
    pretrain_seed: int
    budget: Budget | None = None
    subset_seed: int = 0
    lr_multiplier: float | None = None

    @property
    def kind(self) -> CellKind:
        """Kind of the run."""
        return "probe" if self.budget is None else "finetune" if self.lr_multiplier is None else "selection"

    @property
    def folder(self) -> Path:
        """Folder of the run, relative to that of the study."""
        budget = self.budget.name if self.budget else ""
        if self.lr_multiplier is not None:
            return Path("selection", self.arm.name, budget, f"{self.lr_multiplier:g}")
        name = f"{self.pretrain_seed}-{self.subset_seed}" if self.budget else f"probe-{self.pretrain_seed}"
        return Path("cells", self.arm.name, budget, name)

    def __str__(self) -> str:
        """Format the cell for log messages."""
        if self.budget is None:
            return f"{self.arm.name}, probe, encoder {self.pretrain_seed}"
        if self.lr_multiplier is not None:
            return f"{self.arm.name}, {self.budget.name} labels, learning rate x {self.lr_multiplier:g}"
        return f"{self.arm.name}, {self.budget.name} labels, encoder {self.pretrain_seed}, subset {self.subset_seed}"


@dataclass(frozen=True, kw_only=True)
class Design:
    """Design of a whole study.

    Attributes:
        task: task of the fine-tuned models.
        arms: arms, beginning with scratch.
        budgets: label budgets, smallest first.
        seeds: number of label subsets per budget.
        split_seed: random seed of the split by subject.
        lr_multipliers: factors on the learning rate of the preset to select from; a single factor disables selection.
        lr_selections: names of the arms and budgets with selection of the learning rate.
        eval_steps: steps of the intermediate evaluations.
        probe_seeds: number of label subsets per budget of frozen arms; None for the same number as the other arms.
        metric: metric that is compared and that selects the learning rate; empty for the primary metric of the task.
    """

    task: str
    arms: tuple[Arm, ...]
    budgets: tuple[Budget, ...]
    seeds: int
    split_seed: int = 0
    lr_multipliers: tuple[float, ...] = LR_MULTIPLIERS
    lr_selections: frozenset[tuple[str, str]] = frozenset()
    eval_steps: tuple[int, ...] = ()
    probe_seeds: int | None = None
    metric: str = ""

    @property
    def primary_metric(self) -> str:
        """Metric that is compared and that selects the learning rate."""
        return self.metric or find_task(self.task).metric

    def is_probe_arm(self, arm: Arm) -> bool:
        """Whether an arm is evaluated with a linear probe; frozen segmentation trains a decoder instead."""
        return arm.protocol == "frozen" and find_task(self.task).probe is not None

    def subset_seeds(self, arm: Arm) -> range:
        """Get the random seeds of the label subsets of an arm."""
        limit = self.probe_seeds if arm.protocol == "frozen" else None
        return range(min(self.seeds, limit or self.seeds))

    def list_cells(self, subsets: LabelSubsets) -> list[Cell]:
        """List all cells, ordered so that a study stopped at any time has useful results.

        The order is by subset, then by pretraining seed, then by budget, smallest first, with all arms next to each
        other. The runs that select a learning rate come directly before the runs that need it.
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
    """Count the pretraining seeds of an arm; scratch has as many as the arm with the most, for pairing."""
    return len(arm.runs) or max(len(other.runs) for other in arms)


def read_arms(encoders: Sequence[str], probes: Sequence[str] = ()) -> tuple[Arm, ...]:
    """Read the arms from `--encoder NAME=RUN[,RUN2,...]` and `--frozen ...`, with scratch as the first arm.

    Raises:
        UsageError: there is no arm, a value has another form, or a name is in use or not valid as a folder name.
    """
    arms = [Arm(SCRATCH)]
    for option, values, protocol in (("--encoder", encoders, "finetune"), ("--frozen", probes, "frozen")):
        for value in values:
            name, equals, runs = value.partition("=")
            if not equals or not all(runs.split(",")):
                raise UsageError(f"{option} {value}: expected NAME=RUN or NAME=RUN,RUN2,... with a name for the arm.")
            if not re.fullmatch(r"\w[\w.+-]*", name):
                raise UsageError(f"{option} {value}: expected a name of letters, digits and . + - _, got {name!r}.")
            if name in {UNTRAINED, PIXELS, *(arm.name for arm in arms)}:
                raise UsageError(f"{option} {value}: {name!r} is the name of another arm; use different names.")
            paths = tuple(Path(run) for run in runs.split(","))
            arms.append(Arm(name, paths, "finetune" if protocol == "finetune" else "frozen"))
    if len(arms) == 1:
        raise UsageError("--encoder: expected NAME=RUN, a pretraining run to compare with training from scratch.")
    return tuple(arms)
