"""What the benchmarks share: a run's parts on random views, functions timed in turn, memory of a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from medim.config import PretrainConfig
from medim.models.model import build_decoder, build_encoder
from medim.training.pretrain.run import build_objectives
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Views

Ratio = dict[str, float]


def measure_ratios(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Ratio]:
    """Median (`ratio`), lowest and highest of the time of each function over that of the first.

    All are called in turn, round by round; a first round warms up.
    """
    rows = [[time_function(function) for function in functions.values()] for _ in range(rounds + 1)][1:]
    relative = zip(*([duration / row[0] for duration in row] for row in rows), strict=True)
    return {
        name: {"ratio": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in zip(functions, relative, strict=True)
    }


def time_function(function: Callable[[], object]) -> float:
    """Seconds of one call: with one thread the processor's, which other work moves least; else a clock's."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def format_ratio(ratio: Ratio) -> str:
    """A ratio as text."""
    return f"{ratio['ratio']:.2f} (from {ratio['lowest']:.2f} to {ratio['highest']:.2f})"


@dataclass(frozen=True)
class RunParts:
    """The parts of a pretraining run, with fresh weights, and a batch of random views."""

    encoder: Any
    decoder: Any
    objectives: dict[str, Any]
    views: Views

    @classmethod
    def from_config(cls, config: PretrainConfig) -> RunParts:
        """Make the parts."""
        torch.manual_seed(0)
        shape, count = config.views.shape, config.views.count
        spec = {"encoder": config.encoder, "in_channels": 1, "spatial_dims": len(shape), "input_shape": list(shape)}
        encoder: Any = build_encoder(spec)
        decoder = build_decoder(config.decoder, encoder, len(shape)) if config.decoder else None
        image = torch.randn(config.batch_size, count, 1, *shape)
        views = Views(image, torch.zeros(config.batch_size, count, len(shape)))
        return cls(encoder, decoder, build_objectives(config, encoder, decoder, 1), views)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of all parts."""
        parts = [self.encoder, *(objective for objective, _ in self.objectives.values())]
        return [p for part in [*parts, *([self.decoder] if self.decoder else [])] for p in part.parameters()]

    def encode(self) -> StepEncoder:
        """The encoder as objectives see it in one step."""
        return StepEncoder(self.encoder, self.decoder, self.views, torch.Generator().manual_seed(0))

    def step(self, encode: StepEncoder | None = None) -> None:
        """Forward and backward pass as `PretrainModule` has them: adversaries first, then the weighted sum."""
        encode = encode or self.encode()
        for parameter in self.parameters():
            parameter.grad = None
        for objective, _ in self.objectives.values():
            if hasattr(objective, "adversary_loss"):
                objective.adversary_loss(encode, self.views).backward()
        self.loss(encode).backward()  # type: ignore[no-untyped-call]

    def loss(self, encode: StepEncoder) -> torch.Tensor:
        """The weighted sum of all terms."""
        terms = [(weight, objective(encode, self.views)) for objective, weight in self.objectives.values()]
        return torch.stack(
            [weight * term.loss for weight, objective_terms in terms for term in objective_terms.values()]
        ).sum()


def call_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a fresh process, whose memory nothing else has touched."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_added_memory(function: Callable[[], object]) -> int:
    """Bytes by which the process's peak during a call exceeds what it held before; Linux alone, once a process."""
    before = _read_process_memory("VmRSS")
    function()
    return _read_process_memory("VmHWM") - before


def _read_process_memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
