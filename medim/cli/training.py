"""`medim plan`: what a pretraining run will cost on this machine, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medim.cli.options import (
    AcceleratorOption,
    ConfigOption,
    DataOption,
    PrecisionOption,
    SetOption,
    SplitSeedOption,
    SubjectsOption,
)
from medim.cli.terminal import print_result
from medim.types import Modality, UsageError, UserError


def plan(
    modality: Annotated[Modality | None, typer.Option(help="Default: the configuration's.")] = None,
    data: DataOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, whose disk is looked at. Default: runs/.")] = None,
    split_seed: SplitSeedOption = 0,
    accelerator: AcceleratorOption = "auto",
    precision: PrecisionOption = None,
    subjects: SubjectsOption = None,
    json: Annotated[Path | None, typer.Option("--json", help="FILE for the figures too.")] = None,
) -> None:
    """Run a few real steps; say what the run will need, and refuse one that does not fit this machine."""
    from medim.data.source import open_source
    from medim.files import write_json
    from medim.training.auto_config import describe_input
    from medim.training.plan.plan import check_plan
    from medim.training.plan.plan import plan_pretraining as run
    from medim.training.pretrain.run import resolve_pretrain_config

    config_name = config or modality
    if config_name is None:
        raise UsageError("expected --config, a preset's name or a YAML file, or --modality mri or xray.")
    config_args = config_name, [*(set_ or []), *([f"precision={precision}"] if precision else [])]
    settings = resolve_pretrain_config(*config_args)  # a mistake in it shows before images are read
    if modality and settings.modality != modality:
        raise UserError(f"--config {config}: it is for {settings.modality}, and --modality says {modality}.")
    image_index, store = open_source(data, settings.modality, subjects=subjects)
    settings = resolve_pretrain_config(*config_args, index=image_index)
    options: dict[str, Any] = {"split_seed": split_seed, "accelerator": accelerator, "store": store}
    estimate = run(settings, image_index, out or Path("runs"), **options)
    if json:
        write_json(json, estimate)
    check_plan(estimate)
    print_result("plan", {**_format_plan(estimate), **describe_input(settings, image_index)})


def _format_plan(estimate: dict[str, Any]) -> dict[str, str]:
    """The figures as lines."""
    phase_seconds = {part: seconds for part, seconds in estimate["seconds"].items() if part != "total"}
    disk, free, hints = estimate["disk_bytes"], estimate["available"], estimate["suggestions"]
    largest_sizes = [f"a batch of {hints['batch_size']}"] if hints["batch_size"] else []
    largest_sizes += [f"views of {'x'.join(map(str, hints['views']))}"] if hints["views"] else []
    loads_in_workers = estimate["memory_bytes"] > estimate["peak_memory_bytes"]
    worker_text = f", {_format_gibibytes(estimate['memory_bytes'])} with loading processes" if loads_in_workers else ""
    return {
        "hours": f"{estimate['hours']:.3g} ("
        + ", ".join(f"{part} {_format_duration(seconds)}" for part, seconds in phase_seconds.items())
        + ")",
        "seconds a step": f"{estimate['seconds_per_step']:.3g}, of {estimate['measured_steps']} steps "
        f"of {estimate['measured_batch_size']} images",
        "peak memory": f"{_format_gibibytes(estimate['peak_memory_bytes'])}{worker_text}; "
        f"{_format_gibibytes(free['memory'])} free",
        "disk": f"{_format_gibibytes(disk['total'])} (store {_format_gibibytes(disk['store'])}, "
        f"checkpoints {_format_gibibytes(disk['checkpoints'])}, run "
        f"{_format_gibibytes(disk['run'])}); {_format_gibibytes(free['disk'])} free",
        "would fit too": " or ".join(largest_sizes) + ", by proportion" if largest_sizes else "-",
    }


def _format_gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
