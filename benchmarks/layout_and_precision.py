"""Claim: convolutions channels last and bf16 autocast make a pretraining step of the shipped presets cheaper.

For each preset: seconds of forward and backward pass of encoder and objectives in each of the four combinations over
those of fp32 with channels first; in turn, in one process, median of several rounds.

    python benchmarks/layout_and_precision.py --out layout_and_precision.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medim.config import load
from medim.files import write_json
from medim.models.layers import channels_last
from medim.models.model import build_decoder, build_encoder
from medim.training.encode import StepEncode
from medim.training.pretrain import build_objectives
from medim.types import Views

PRESETS = ("mri-crop", "xray-28")


def main() -> None:
    """Measure every preset, print the ratios, write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("layout_and_precision.json"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = {preset: measure(preset, arguments.rounds) for preset in PRESETS}
    for preset, row in rows.items():
        print(f"{preset:10} " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.items()))
    write_json(arguments.out, {"schema_version": 1, "threads": torch.get_num_threads(), "over_fp32_first": rows})


def measure(preset: str, rounds: int) -> dict[str, float]:
    """Median ratios of the combinations, after one round to warm up."""
    steps = {
        f"{precision} channels {layout}": step_of(preset, bf16=precision == "bf16", last=layout == "last")
        for precision in ("fp32", "bf16")
        for layout in ("first", "last")
    }
    taken = [{name: seconds(step) for name, step in steps.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(row[name] / row["fp32 channels first"] for row in taken) for name in steps}


def step_of(preset: str, *, bf16: bool, last: bool) -> Callable[[], None]:
    """One forward and backward pass of a preset on random views."""
    config = load("pretrain", preset)
    torch.manual_seed(0)
    shape, count = config.views.shape, config.views.count
    spec = {"encoder": config.encoder, "in_channels": 1, "spatial_dims": len(shape), "input_shape": list(shape)}
    encoder: Any = build_encoder(spec)
    decoder = build_decoder(config.decoder, encoder, len(shape)) if config.decoder else None
    objectives = build_objectives(config, encoder, decoder, 1)
    if last:
        channels_last(encoder)
    if last and decoder is not None:
        channels_last(decoder)
    views = Views(torch.randn(config.batch_size, count, 1, *shape), torch.zeros(config.batch_size, count, len(shape)))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            encode = StepEncode(encoder, decoder, views, torch.Generator().manual_seed(0))
            losses = [w * t.loss for o, w in objectives.values() for t in o(encode, views).values()]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]

    return step


def seconds(function: Callable[[], None]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
