"""How long a study will take on this machine: a few steps and a few images are timed before it starts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from medim.data.parallel import available
from medim.evaluation.evaluate import validate
from medim.models.layers import channels_last
from medim.models.model import as_run, build_model
from medim.study.cell import Bench, summary_of
from medim.study.design import Cell, Protocol
from medim.study.lr_selection import SHARE
from medim.training.engine.optim import optimiser
from medim.training.finetune.run import loader_of, spec_of

log = logging.getLogger(__name__)
STEPS = 4  # timed, after one to warm up
IMAGES = 8
OVERHEAD_SECONDS = 1.0  # of a cell beside steps and measurements (benchmarks/study_overhead.py)
FIT_SECONDS = 0.5  # of a probe's classifier
ON_THE_WAY = (  # shares of the schedule, by how many can be afforded
    (),
    (0.2,),
    (0.1, 0.4),
    (0.05, 0.2, 0.7),
    (0.05, 0.1, 0.2, 0.4),
    (0.05, 0.1, 0.2, 0.4, 0.7),
)
EVALUATION_SHARE = 1 / 3  # of the training time, at most, for measurements on the way


@dataclass(frozen=True)
class Costs:
    """What the parts of a cell take here, in seconds.

    Attributes:
        step: of training, by protocol.
        image: of evaluation.
    """

    step: dict[Protocol, float]
    image: float


def measure(bench: Bench, jobs: int) -> Costs:
    """Time a few steps of each protocol, and the evaluation of a few images, with the threads of one job."""
    log.info("timing a few steps and images on this machine")
    with _threads(max(1, available() // jobs) if jobs > 1 else torch.get_num_threads()), torch.random.fork_rng([]):
        trained = {arm.protocol for arm in bench.design.arms if not bench.design.probed(arm)}
        steps = {protocol: _step_seconds(bench, frozen=protocol == "frozen") for protocol in sorted(trained)}
        return Costs(steps, _image_seconds(bench))


def expected(bench: Bench, costs: Costs, cell: Cell) -> float:
    """Seconds that a cell will take."""
    cohort, design = bench.cohort, bench.design
    val = len(cohort.records("val"))
    if cell.kind == "probe":
        images = val + len(cohort.records("train"))
        fits = len(bench.subsets) * FIT_SECONDS
        return OVERHEAD_SECONDS + 3 * (images * costs.image + fits)  # the encoder and two anchors
    training = bench.config.max_steps * costs.step[cell.arm.protocol]
    if cell.kind == "selection":
        assert cell.budget is not None
        return OVERHEAD_SECONDS + training + SHARE * len(bench.subsets[cell.budget, 0]) * costs.image
    return OVERHEAD_SECONDS + training + (1 + len(design.measure_at)) * val * costs.image


class Clock:
    """What cells will take: as the finished ones of their kind did that were never stopped, else as estimated.

    Args:
        bench: what all cells share.
        costs: measures them, where no cell of a kind is finished.
        cells: of the whole study.
    """

    def __init__(self, bench: Bench, costs: Callable[[], Costs], cells: Sequence[Cell]) -> None:
        self._bench, self._costs, self._cells = bench, costs, cells
        self._taken: dict[Cell, float] = {}

    def __call__(self, cell: Cell) -> float:
        """Seconds."""
        alike = [seconds for done, seconds in self._known() if _kind(done) == _kind(cell)]
        return fmean(alike) if alike else expected(self._bench, self._costs(), cell)

    def _known(self) -> Iterator[tuple[Cell, float]]:
        for cell in self._cells:
            if cell.kind == "probe":
                continue
            if cell not in self._taken and self._bench.done(cell):
                summary = summary_of(self._bench, cell)
                if summary["resumed_from_steps"]:  # its seconds are those of its last part
                    continue
                self._taken[cell] = summary["seconds"]
            if cell in self._taken:
                yield cell, self._taken[cell]


def on_the_way(bench: Bench, costs: Costs) -> tuple[int, ...]:
    """Steps after which to measure, as many as cost at most a third of the training."""
    steps = bench.config.max_steps
    training = steps * costs.step["finetune"]
    once = len(bench.cohort.records("val")) * costs.image
    shares = ON_THE_WAY[min(int(EVALUATION_SHARE * training / once), len(ON_THE_WAY) - 1)]
    return tuple(sorted({max(1, round(share * steps)) for share in shares} - {steps}))


def _kind(cell: Cell) -> tuple[str, str]:
    return cell.kind, cell.arm.protocol


def _step_seconds(bench: Bench, *, frozen: bool) -> float:
    config, cohort = bench.config, bench.cohort
    spec = spec_of(config, cohort, 0, bench.design.split_seed)
    model = build_model(spec).to(_device(bench))
    if frozen:
        model.freeze([model.encoder])
    channels_last(model.train())
    main, _ = optimiser([(model, 1.0)], **config.optimisation)
    head: Any = model.head
    loader = loader_of(config, cohort, cohort.records("train"), spec["classes"], steps=1 + STEPS, seed=0)
    taken, began = [], time.perf_counter()
    for image, target in loader:
        with torch.autocast(_device(bench), torch.bfloat16, enabled=config.precision == "bf16-mixed"):
            loss = head.loss(model(image.to(_device(bench))), target.to(_device(bench)))
        main.zero_grad()
        loss.backward()
        main.step()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - began)
        began = time.perf_counter()
    return median(taken[1:])


def _image_seconds(bench: Bench) -> float:
    cohort = bench.cohort
    spec = spec_of(bench.config, cohort, 0, bench.design.split_seed)
    model, val = build_model(spec).to(_device(bench)).eval(), cohort.records("val")
    few = val[:: -(-len(val) // IMAGES)]
    began = time.perf_counter()
    validate(as_run(model), cohort.index, few, spec)
    return (time.perf_counter() - began) / len(few)


def _device(bench: Bench) -> str:
    return "cuda" if torch.cuda.is_available() and bench.accelerator != "cpu" else "cpu"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
