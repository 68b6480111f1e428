"""Claim: channels-last convolutions and bf16 autocast reduce the time of a pretraining step of the built-in presets.

For each preset, forward and backward pass of encoder and objectives are timed in each of the four combinations,
relative to fp32 with channels first: alternating calls in one process, median of several rounds.

    python benchmarks/layout_and_precision.py --out layout_and_precision.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import Ratio, RunParts, format_ratio, measure_ratios

from medim.config import load_config
from medim.files import write_json
from medim.models.layers import use_channels_last

PRESETS = ("mri-crop", "xray-28")


def main() -> None:
    """Measure all presets; print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("layout_and_precision.json"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = {preset: measure_layouts(preset, arguments.rounds) for preset in PRESETS}
    for preset, row in rows.items():
        print(f"{preset:10} " + ", ".join(f"{name} {format_ratio(ratio)}" for name, ratio in row.items()))
    write_json(arguments.out, {"schema_version": 2, "threads": torch.get_num_threads(), "over_fp32_first": rows})


def measure_layouts(preset: str, rounds: int) -> dict[str, Ratio]:
    """Measure the ratios of the combinations."""
    steps = {
        f"{precision} channels {layout}": build_layout_step(preset, bf16=precision == "bf16", last=layout == "last")
        for precision in ("fp32", "bf16")
        for layout in ("first", "last")
    }
    return measure_ratios(steps, rounds)


def build_layout_step(preset: str, *, bf16: bool, last: bool) -> Callable[[], None]:
    """Build a forward and backward pass of a preset on random views."""
    run = RunParts.from_config(load_config("pretrain", preset))
    for part in (run.encoder, run.decoder):
        if last and part is not None:
            use_channels_last(part)

    def run_step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = run.loss(run.encode())
        loss.backward()  # type: ignore[no-untyped-call]

    return run_step


if __name__ == "__main__":
    main()
