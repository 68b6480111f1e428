"""Command line of medim: each command parses its options, makes one call and prints the result.

Heavy imports are inside the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medim.cli.audit import audit
from medim.cli.data import example, fetch, index, locate, preprocess
from medim.cli.evaluation import evaluate, probe, report, study
from medim.cli.package import embed, export, predict, verify
from medim.cli.serve import serve_app
from medim.cli.terminal import console, print_result, register_command
from medim.cli.training import finetune, plan, pretrain, sync
from medim.version import __version__

app = typer.Typer(
    name="medim",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pretrain encoders for MRI and X-ray with Deep InfoMax, fine-tune and evaluate them, export them as packages.",
)
config_app = typer.Typer(no_args_is_help=True, help="List, print, copy and compare configurations.")
app.add_typer(config_app, name="config")


def main() -> None:
    """Entry point of the `medim` script."""
    app()


@app.callback(invoke_without_command=True)
def _print_version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"medim {__version__}")
        raise typer.Exit


@register_command(app)
def doctor() -> None:
    """Check the packages, devices and disk space of this machine.

    The codecs of compressed DICOM images are checked too.
    """
    from medim.doctor import run_checks

    for check in run_checks():
        mark = "[green]ok[/]" if check.ok else "[yellow]--[/]"
        console.print(
            f"{mark} {check.name}: {check.status}" + (f"  -> {check.remedy}" if check.remedy else ""),
            highlight=False,
            soft_wrap=True,
        )


@register_command(config_app, "list")
def config_list(
    all_: Annotated[
        bool, typer.Option("--all", help="List the presets of published methods and of tests, too.")
    ] = False,
) -> None:
    """List the shipped presets."""
    from medim.cli.presets import START_PRESETS, read_preset_title
    from medim.config import list_presets

    presets = {(kind, name): path for kind in ("pretrain", "finetune") for name, path in list_presets(kind).items()}
    shown = {key: path for key, path in presets.items() if all_ or not key[1].startswith("test-")}
    rest = [key for key in shown if key not in START_PRESETS]
    width = max(len(name) for _, name in shown)
    for title, keys in (("Start here", START_PRESETS), ("More", rest if all_ else ())):
        if keys:
            console.print(f"{title}:", highlight=False)
        for kind, name in keys:
            line = f"  {kind:9} {name:{width}} {read_preset_title(presets[kind, name])}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if not all_:
        console.print(f"{len(presets) - len(START_PRESETS)} more: medim config list --all", highlight=False)


@register_command(config_app, "show")
def config_show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Name of a preset, YAML file, or folder of a run.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="Images from which the values `auto` are computed, as in a run."),
    ] = None,
) -> None:
    """Print every value of a configuration with its description."""
    from medim.cli.presets import render_config, resolve_content

    typer.echo(render_config(name, None if data is None else resolve_content(name, data)))


@register_command(config_app, "copy")
def config_copy(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Name of a preset, YAML file, or folder of a run.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="New YAML file, for --config.")],
) -> None:
    """Copy a configuration, with every value and its description, into a file."""
    from medim.cli.presets import copy_config

    copy_config(name, file)
    print_result("config copy", {"written to": file, "use": f"--config {file}"})


@register_command(config_app, "diff")
def config_diff(
    first: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Name of a preset, YAML file, or folder of a run.")],
    second: Annotated[str, typer.Argument(metavar="NAME|FILE", help="Another one.")],
) -> None:
    """List the values in which two configurations differ."""
    from medim.cli.presets import compare_configs

    differences = compare_configs(first, second)
    print_result("config diff", differences or {"differences": "none"})


for command in (
    example,
    fetch,
    index,
    audit,
    locate,
    preprocess,
    plan,
    pretrain,
    finetune,
    sync,
    evaluate,
    probe,
    study,
    report,
    export,
    verify,
    predict,
    embed,
):  # in the order of `medim --help`
    register_command(app)(command)
app.add_typer(serve_app, name="serve")
