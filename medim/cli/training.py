"""`medim plan`: what a pretraining run will cost on this machine, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medim.cli.options import Accelerator, Config, Data, Precision, Set, SplitSeed, Subjects
from medim.cli.terminal import show
from medim.types import Modality, UsageError, UserError


def plan(
    modality: Annotated[Modality | None, typer.Option(help="Default: the configuration's.")] = None,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder, whose disk is looked at. Default: runs/.")] = None,
    split_seed: SplitSeed = 0,
    accelerator: Accelerator = "auto",
    precision: Precision = None,
    subjects: Subjects = None,
    json: Annotated[Path | None, typer.Option("--json", help="FILE for the figures too.")] = None,
) -> None:
    """Run a few real steps; say what the run will need, and refuse one that does not fit this machine."""
    from medim.data.source import open_source
    from medim.files import write_json
    from medim.training.auto_config import describe
    from medim.training.plan.plan import check
    from medim.training.plan.plan import plan as run
    from medim.training.pretrain.run import resolve_config

    name = config or modality
    if name is None:
        raise UsageError("expected --config, a preset's name or a YAML file, or --modality mri or xray.")
    chosen = name, [*(set_ or []), *([f"precision={precision}"] if precision else [])]
    settings = resolve_config(*chosen)  # a mistake in it shows before images are read
    if modality and settings.modality != modality:
        raise UserError(f"--config {config}: it is for {settings.modality}, and --modality says {modality}.")
    found, store = open_source(data, settings.modality, subjects=subjects)
    settings = resolve_config(*chosen, index=found)
    options: dict[str, Any] = {"split_seed": split_seed, "accelerator": accelerator, "store": store}
    told = run(settings, found, out or Path("runs"), **options)
    if json:
        write_json(json, told)
    check(told)
    show("plan", {**_rows(told), **describe(settings, found)})


def _rows(told: dict[str, Any]) -> dict[str, str]:
    """The figures as lines."""
    parts = {part: seconds for part, seconds in told["seconds"].items() if part != "total"}
    disk, free, hints = told["disk_bytes"], told["available"], told["suggestions"]
    most = [f"a batch of {hints['batch_size']}"] if hints["batch_size"] else []
    most += [f"views of {'x'.join(map(str, hints['views']))}"] if hints["views"] else []
    workers = told["memory_bytes"] > told["peak_memory_bytes"]
    with_workers = f", {_gib(told['memory_bytes'])} with loading processes" if workers else ""
    return {
        "hours": f"{told['hours']:.3g} ("
        + ", ".join(f"{part} {_duration(seconds)}" for part, seconds in parts.items())
        + ")",
        "seconds a step": f"{told['seconds_per_step']:.3g}, of {told['measured_steps']} steps "
        f"of {told['measured_batch_size']} images",
        "peak memory": f"{_gib(told['peak_memory_bytes'])}{with_workers}; {_gib(free['memory'])} free",
        "disk": f"{_gib(disk['total'])} (store {_gib(disk['store'])}, checkpoints {_gib(disk['checkpoints'])}, run "
        f"{_gib(disk['run'])}); {_gib(free['disk'])} free",
        "would fit too": " or ".join(most) + ", by proportion" if most else "-",
    }


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
