"""Shared functions of the benchmarks: parts of a run on random views, alternating timing, and memory of a process."""

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
from medim.model_spec import NetworkSpec
from medim.models.model import build_decoder, build_encoder
from medim.training.pretrain.config import build_objectives
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Views

Ratio = dict[str, float]


def measure_ratios(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Ratio]:
    """Measure the time of each function relative to the first: median (`ratio`), lowest and highest.

    The functions are called in turn in each round, after a warm-up round.
    """
    rows = [[time_function(function) for function in functions.values()] for _ in range(rounds + 1)][1:]
    relative = zip(*([duration / row[0] for duration in row] for row in rows), strict=True)
    return {
        name: {"ratio": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in zip(functions, relative, strict=True)
    }


def time_function(function: Callable[[], object]) -> float:
    """Measure one call in seconds: CPU time with one thread, which other processes affect least; else wall time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def format_ratio(ratio: Ratio) -> str:
    """Format a ratio as text."""
    return f"{ratio['ratio']:.2f} (from {ratio['lowest']:.2f} to {ratio['highest']:.2f})"


@dataclass(frozen=True)
class RunParts:
    """Parts of a pretraining run with random weights, and a batch of random views."""

    encoder: Any
    decoder: Any
    objectives: dict[str, Any]
    views: Views

    @classmethod
    def from_config(cls, config: PretrainConfig) -> RunParts:
        """Build the parts of a configuration."""
        torch.manual_seed(0)
        shape, count = config.views.shape, config.views.count
        spec = NetworkSpec(encoder=config.encoder, in_channels=1, spatial_dims=len(shape), input_shape=tuple(shape))
        encoder: Any = build_encoder(spec)
        decoder = build_decoder(config.decoder, encoder, len(shape)) if config.decoder else None
        image = torch.randn(config.batch_size, count, 1, *shape)
        views = Views(image, torch.zeros(config.batch_size, count, len(shape)))
        return cls(encoder, decoder, build_objectives(config, encoder, decoder, 1), views)

    def parameters(self) -> list[torch.nn.Parameter]:
        """List the parameters of all parts."""
        parts = [self.encoder, *(objective for objective, _ in self.objectives.values())]
        return [p for part in [*parts, *([self.decoder] if self.decoder else [])] for p in part.parameters()]

    def encode(self) -> StepEncoder:
        """Build the encoder that the objectives use in one step."""
        return StepEncoder(self.encoder, self.decoder, self.views, torch.Generator().manual_seed(0))

    def step(self, encode: StepEncoder | None = None) -> None:
        """Run forward and backward pass as in `PretrainModule`: adversaries first, then the weighted sum."""
        encode = encode or self.encode()
        for parameter in self.parameters():
            parameter.grad = None
        for objective, _ in self.objectives.values():
            if hasattr(objective, "adversary_loss"):
                objective.adversary_loss(encode, self.views).backward()
        self.loss(encode).backward()  # type: ignore[no-untyped-call]

    def loss(self, encode: StepEncoder) -> torch.Tensor:
        """Compute the weighted sum of all terms."""
        terms = [(weight, objective(encode, self.views)) for objective, weight in self.objectives.values()]
        return torch.stack(
            [weight * term.loss for weight, objective_terms in terms for term in objective_terms.values()]
        ).sum()


def call_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a new process, so that earlier allocations do not affect its memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_added_memory(function: Callable[[], object]) -> int:
    """Measure the increase of peak memory by a call in bytes; works on Linux, once per process."""
    before = _read_process_memory("VmRSS")
    function()
    return _read_process_memory("VmHWM") - before


def _read_process_memory(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024
