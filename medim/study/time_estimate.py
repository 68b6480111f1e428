"""Estimate the duration of a study on this machine, by timing a few steps and images before it starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from medim.data.parallel import count_cpus
from medim.evaluation.evaluate import validate_network
from medim.models.layers import use_channels_last
from medim.models.model import as_numpy_function, build_model
from medim.study.cell import StudyContext, read_cell_summary
from medim.study.design import ArmProtocol, Cell
from medim.study.lr_selection import HOLDOUT_SHARE
from medim.training.engine.optim import build_optimiser
from medim.training.engine.trainer import choose_precision
from medim.training.finetune.run import build_finetune_loader, build_model_spec

log = logging.getLogger(__name__)
STEPS = 4  # timed steps, after one warm-up step
IMAGES = 8
OVERHEAD_SECONDS = 1.0  # overhead per cell beyond steps and evaluations (benchmarks/study_overhead.py)
FIT_SECONDS = 0.5  # time to fit one classifier of a probe
EVALUATION_SCHEDULES = (  # fractions of the training steps, by number of affordable evaluations
    (),
    (0.2,),
    (0.1, 0.4),
    (0.05, 0.2, 0.7),
    (0.05, 0.1, 0.2, 0.4),
    (0.05, 0.1, 0.2, 0.4, 0.7),
)
EVALUATION_SHARE = 1 / 3  # largest fraction of the training time for intermediate evaluations


@dataclass(frozen=True)
class Costs:
    """Duration of the parts of a cell on this machine, in seconds.

    Attributes:
        step: duration of a training step by protocol.
        image: duration of the evaluation of an image.
    """

    step: dict[ArmProtocol, float]
    image: float


def measure_costs(context: StudyContext, jobs: int) -> Costs:
    """Time a few steps of each protocol and the evaluation of a few images, with the threads of one job."""
    log.info("timing a few steps and images on this machine")
    with (
        _limit_threads(max(1, count_cpus() // jobs) if jobs > 1 else torch.get_num_threads()),
        torch.random.fork_rng([]),
    ):
        protocols = {arm.protocol for arm in context.design.arms if not context.design.is_probe_arm(arm)}
        steps = {protocol: _time_step(context, frozen=protocol == "frozen") for protocol in sorted(protocols)}
        return Costs(steps, _time_image(context))


def estimate_cell_seconds(context: StudyContext, costs: Costs, cell: Cell) -> float:
    """Estimate the duration of a cell in seconds."""
    cohort, design = context.cohort, context.design
    val = len(cohort.records("val"))
    if cell.kind == "probe":
        images = val + len(cohort.records("train"))
        fits = len(context.subsets) * FIT_SECONDS
        return OVERHEAD_SECONDS + 3 * (images * costs.image + fits)  # the encoder and two baselines
    training_seconds = context.config.max_steps * costs.step[cell.arm.protocol]
    if cell.kind == "selection":
        assert cell.budget is not None
        return OVERHEAD_SECONDS + training_seconds + HOLDOUT_SHARE * len(context.subsets[cell.budget, 0]) * costs.image
    return OVERHEAD_SECONDS + training_seconds + (1 + len(design.eval_steps)) * val * costs.image


class DurationEstimator:
    """Estimate of the duration of cells: the mean of finished cells of the same kind, or an estimate from costs.

    Finished cells that were stopped and resumed are not used.

    Args:
        context: data shared by the cells.
        costs: function that measures the costs; called if no cell of a kind is finished.
        cells: all cells of the study.
    """

    def __init__(self, context: StudyContext, costs: Callable[[], Costs], cells: Sequence[Cell]) -> None:
        self._context, self._costs, self._cells = context, costs, cells
        self._durations: dict[Cell, float] = {}

    def __call__(self, cell: Cell) -> float:
        """Estimate the duration of a cell in seconds."""
        durations = [
            seconds for other, seconds in self._iter_durations() if _get_cell_kind(other) == _get_cell_kind(cell)
        ]
        return fmean(durations) if durations else estimate_cell_seconds(self._context, self._costs(), cell)

    def _iter_durations(self) -> Iterator[tuple[Cell, float]]:
        for cell in self._cells:
            if cell.kind == "probe":
                continue
            if cell not in self._durations and self._context.is_complete(cell):
                summary = read_cell_summary(self._context, cell)
                if summary["resumed_from_steps"]:  # the recorded duration is only that of the last part
                    continue
                self._durations[cell] = summary["seconds"]
            if cell in self._durations:
                yield cell, self._durations[cell]


def intermediate_eval_steps(context: StudyContext, costs: Costs) -> tuple[int, ...]:
    """Compute the steps of intermediate evaluations, with a total cost of at most a third of the training."""
    steps = context.config.max_steps
    training_seconds = steps * costs.step["finetune"]
    evaluation_seconds = len(context.cohort.records("val")) * costs.image
    shares = EVALUATION_SCHEDULES[
        min(int(EVALUATION_SHARE * training_seconds / evaluation_seconds), len(EVALUATION_SCHEDULES) - 1)
    ]
    return tuple(sorted({max(1, round(share * steps)) for share in shares} - {steps}))


def _get_cell_kind(cell: Cell) -> tuple[str, str]:
    return cell.kind, cell.arm.protocol


def _time_step(context: StudyContext, *, frozen: bool) -> float:
    config, cohort = context.config, context.cohort
    spec = build_model_spec(config, cohort, 0, context.design.split_seed)
    model = build_model(spec).to(_get_device_name(context))
    if frozen:
        model.freeze([model.encoder])
    use_channels_last(model.train())
    main_optimiser, _ = build_optimiser([(model, 1.0)], **config.optimisation)
    head: Any = model.head
    loader = build_finetune_loader(config, cohort, cohort.records("train"), spec.classes, steps=1 + STEPS, seed=0)
    precision = choose_precision(config.precision, context.accelerator, config.spatial_dims)
    durations, start = [], time.perf_counter()
    for image, target in loader:
        with torch.autocast(_get_device_name(context), torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = head.loss(model(image.to(_get_device_name(context))), target.to(_get_device_name(context)))
        main_optimiser.zero_grad()
        loss.backward()
        main_optimiser.step()
        loss.item()  # synchronise with the device
        durations.append(time.perf_counter() - start)
        start = time.perf_counter()
    return median(durations[1:])


def _time_image(context: StudyContext) -> float:
    cohort = context.cohort
    spec = build_model_spec(context.config, cohort, 0, context.design.split_seed)
    model, val = build_model(spec).to(_get_device_name(context)).eval(), cohort.records("val")
    sample = val[:: -(-len(val) // IMAGES)]
    start = time.perf_counter()
    validate_network(as_numpy_function(model), cohort.index, sample, spec)
    return (time.perf_counter() - start) / len(sample)


def _get_device_name(context: StudyContext) -> str:
    return "cuda" if torch.cuda.is_available() and context.accelerator != "cpu" else "cpu"


@contextmanager
def _limit_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
