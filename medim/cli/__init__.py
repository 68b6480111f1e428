"""Command line of medim: each command parses its options, makes one call and prints the result.

Heavy imports are inside the commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

from medim.cli.data import example, fetch, index, locate, preprocess
from medim.cli.evaluation import evaluate, probe, report, study
from medim.cli.package import embed, export, predict, verify
from medim.cli.serve import serve_app
from medim.cli.terminal import console, register_command
from medim.cli.training import finetune, plan, pretrain, sync
from medim.version import __version__

app = typer.Typer(
    name="medim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pretrain encoders for MRI and X-ray with Deep InfoMax, fine-tune and evaluate them, export them as packages.",
)
config_app = typer.Typer(no_args_is_help=True, help="List and print the shipped presets.")
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
def config_list() -> None:
    """List the shipped presets."""
    from medim.config import list_presets

    rows = [(kind, name, path) for kind in ("pretrain", "finetune") for name, path in list_presets(kind).items()]
    width = max(len(name) for _, name, _ in rows)
    for kind, name, path in rows:
        title = path.read_text().splitlines()[0].lstrip("# ")
        console.print(f"{kind:9} {name:{width}} {title}", highlight=False, soft_wrap=True)


@register_command(config_app, "show")
def config_show(name: Annotated[str, typer.Argument(help="Name of a preset.")]) -> None:
    """Print every value of a preset with its description."""
    from medim.cli.presets import render_preset

    typer.echo(render_preset(name))


for command in (
    example,
    fetch,
    index,
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
