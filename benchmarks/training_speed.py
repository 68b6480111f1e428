"""Effect of each speed and memory option on a pretraining step on the CPU.

For each case, the CPU time (one thread) of forward and backward pass with one changed option is measured relative to
the default (fp32, channels last, no checkpointing, no compiler): alternating calls in one process, median of the
rounds. The increase of peak memory by a step is measured in a separate process per option.

    OMP_NUM_THREADS=1 python benchmarks/training_speed.py --out training_speed.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import RunParts, call_in_process, format_ratio, measure_added_memory, measure_ratios

from medim.config import load_config
from medim.files import write_json
from medim.models.layers import use_channels_last
from medim.training.pretrain.step_encoder import StepEncoder

RESNET = "encoder={name: resnet, widths: [16, 32, 64], norm: gn, summary: mean_max, hidden: 0, summary_channels: 64}"
CASES: dict[str, tuple[str, list[str]]] = {
    "xray-28, 256 images, resnet": ("xray-28", ["batch_size=256", RESNET, "views.count=1"]),
    "test-3d, 32 images, unet": (
        "test-3d-local-dim",
        ["batch_size=32", "views.count=1", "encoder={name: unet, channels: [8, 16, 32], summary_channels: 32}"],
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "channels first": {"last": False},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "compile": {"compiled": True},
    "checkpointing (chunk = batch)": {"share": 1},
    "an eighth at a time": {"share": 8},
}
MEMORY = ("default", "bf16", "checkpointing (chunk = batch)", "an eighth at a time")


def main() -> None:
    """Measure all cases; print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("training_speed.json"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leave-out", nargs="*", default=[], choices=list(OPTIONS)[1:], help="options to omit")
    arguments = parser.parse_args()
    options = [name for name in OPTIONS if name not in arguments.leave_out]
    content: dict[str, Any] = {"schema_version": 1, "threads": torch.get_num_threads(), "cases": {}}
    for case in CASES:
        times = measure_ratios({name: build_option_step(case, **OPTIONS[name]) for name in options}, arguments.rounds)
        bytes_ = {name: call_in_process(measure_option_memory, case, name) for name in MEMORY if name in options}
        for name, ratio in times.items():
            print(f"{case:30} {name:30} time {format_ratio(ratio)}{_format_memory_ratio(name, bytes_)}", flush=True)
        content["cases"][case] = {"time_over_default": times, "added_bytes": bytes_}
        write_json(arguments.out, content)


def _format_memory_ratio(name: str, bytes_: dict[str, int]) -> str:
    return f", memory {bytes_[name] / bytes_['default']:.2f}" if name in bytes_ else ""


def measure_option_memory(case: str, option: str) -> int:
    """Measure the increase of peak memory by a step, in bytes."""
    torch.set_num_threads(1)
    return measure_added_memory(build_option_step(case, **OPTIONS[option]))


def build_option_step(
    case: str, *, dtype: torch.dtype | None = None, last: bool = True, compiled: bool = False, share: int = 0
) -> Callable[[], None]:
    """Build a forward and backward pass of a case on random views."""
    preset, assignments = CASES[case]
    run = RunParts.from_config(load_config("pretrain", preset, assignments))
    if last:
        use_channels_last(run.encoder)
    encoder: Any = torch.compile(run.encoder) if compiled else run.encoder
    images = run.views.image.shape[0] * run.views.image.shape[1]
    chunk = images // share if share else None

    def run_step() -> None:
        for parameter in run.parameters():
            parameter.grad = None
        encode = StepEncoder(encoder, None, run.views, torch.Generator().manual_seed(0), chunk=chunk)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = run.loss(encode)
        (loss * (256 if dtype == torch.float16 else 1)).backward()  # type: ignore[no-untyped-call]

    return run_step


if __name__ == "__main__":
    main()
