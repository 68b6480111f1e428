"""Builds the options of every command into the page on the command line, from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from medim.cli import app

PLACE = "<!-- options -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return markdown.replace(PLACE, format_options()) if PLACE in markdown else markdown


def list_commands() -> dict[str, Any]:
    """Every command by its full name, `config list` included."""
    group: Any = typer.main.get_command(app)
    commands_by_name = {}
    for name, command in group.commands.items():
        subcommands = getattr(command, "commands", None)
        commands_by_name.update(
            {f"{name} {sub}": body for sub, body in subcommands.items()} if subcommands else {name: command}
        )
    return commands_by_name


def format_options() -> str:
    """A section a command: what it does, and a table of its options."""
    lines = []
    for name, command in list_commands().items():
        lines += [f"### medim {name}", "", command.help or "", ""]
        lines += ["| option | meaning | default |", "| --- | --- | --- |"]
        for option in command.params:
            argument = option.param_type_name == "argument"
            words = [option.name.upper()] if argument else option.opts
            default = "" if option.default in (None, False) else f"`{option.default}`"
            names = " ".join(f"`{word}`" for word in words)
            lines.append(f"| {names} | {option.help or ''} | {'needed' if option.required else default} |")
        lines.append("")
    return "\n".join(lines)
