"""Claim: what a pretraining step costs beyond its encoder.

For each preset: seconds of a whole step (loss, backward pass, optimiser, all objectives) over seconds of the encoder's
own forward and backward pass on the same images, in turn, in one process. Loading is left out; a run's summary has its
share as data_wait_fraction.

    python benchmarks/step_overhead.py --out step_overhead.json
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medim.files import write_json
from medim.models.model import build_decoder, build_encoder
from medim.training.encode import StepEncode
from medim.training.pretrain import build_objectives, resolve_config
from medim.types import Views

PRESETS = ("mri-demo", "mri-crop", "xray-28", "xray")


def main() -> None:
    """Measure every preset, print the ratios, write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("step_overhead.json"))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rows = {preset: measure(preset, arguments.rounds) for preset in PRESETS}
    for preset, row in rows.items():
        print(f"{preset:10} step / encoder: {row['ratio']:.2f} (from {row['lowest']:.2f} to {row['highest']:.2f})")
    write_json(arguments.out, {"schema_version": 1, "threads": torch.get_num_threads(), "step_over_encoder": rows})


def measure(preset: str, rounds: int) -> dict[str, float]:
    """Median, lowest and highest ratio over pairs of an encoder pass and a step, after one pair to warm up."""
    config = resolve_config(preset)
    torch.manual_seed(0)
    shape, count = config.views.shape, config.views.count
    spec = {"encoder": config.encoder, "in_channels": 1, "spatial_dims": len(shape), "input_shape": list(shape)}
    encoder: Any = build_encoder(spec)
    decoder: Any = build_decoder(config.decoder, encoder, len(shape)) if config.decoder else None
    objectives = build_objectives(config, encoder, decoder, 1)
    parameters = [*encoder.parameters(), *(p for o, _ in objectives.values() for p in o.parameters())]
    parameters += decoder.parameters() if decoder else []
    optimiser = torch.optim.AdamW(parameters, lr=config.lr)
    views = Views(torch.randn(config.batch_size, count, 1, *shape), torch.zeros(config.batch_size, count, len(shape)))

    def encoder_alone() -> None:
        features = encoder(views.image.flatten(0, 1))
        (features.summary.sum() + sum(m.sum() for m in features.maps)).backward()
        optimiser.zero_grad()

    def step() -> None:
        encode = StepEncode(encoder, decoder, views, torch.Generator().manual_seed(0))
        losses = [w * t.loss for o, w in objectives.values() for t in o(encode, views).values()]
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimiser.step()
        optimiser.zero_grad()

    pairs = [(seconds(encoder_alone), seconds(step)) for _ in range(rounds + 1)][1:]
    ratios = [b / a for a, b in pairs]
    return {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def seconds(function: Callable[[], None]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
