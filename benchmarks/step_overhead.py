"""Overhead of a pretraining step beyond its encoder.

For each preset, the time of a complete step (loss, backward pass, optimiser, all objectives) is measured relative to
the forward and backward pass of the encoder on the same images, by alternating calls in one process. Data loading is
excluded; the summary of a run contains its fraction as dataloader_wait_fraction.

    python benchmarks/step_overhead.py --out step_overhead.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from timing import Ratio, RunParts, format_ratio, measure_ratios

from medim.files import write_json
from medim.training.pretrain.config import resolve_pretrain_config

PRESETS = ("mri-demo", "mri-crop", "xray-28", "xray")


def main() -> None:
    """Measure all presets; print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("step_overhead.json"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = {preset: measure_step_overhead(preset, arguments.rounds) for preset in PRESETS}
    for preset, row in rows.items():
        print(f"{preset:10} step / encoder: {format_ratio(row)}")
    write_json(arguments.out, {"schema_version": 1, "threads": torch.get_num_threads(), "step_over_encoder": rows})


def measure_step_overhead(preset: str, rounds: int) -> Ratio:
    """Measure the ratio of a step to an encoder pass."""
    config = resolve_pretrain_config(preset)
    run = RunParts.from_config(config)
    parameters = run.parameters()
    optimiser = torch.optim.AdamW(parameters, lr=config.lr)

    def run_encoder() -> None:
        features = run.encoder(run.views.image.flatten(0, 1))
        (features.summary.sum() + sum(m.sum() for m in features.maps)).backward()
        optimiser.zero_grad()

    def run_step() -> None:
        run.step()
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimiser.step()

    return measure_ratios({"encoder": run_encoder, "step": run_step}, rounds)["step"]


if __name__ == "__main__":
    main()
