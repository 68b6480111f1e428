"""Builds the options of every command into the page on the command line, from the commands themselves."""

from __future__ import annotations

from typing import Any

import typer

from medim.cli import app

PLACE = "<!-- options -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return markdown.replace(PLACE, options()) if PLACE in markdown else markdown


def commands() -> dict[str, Any]:
    """Every command by its full name, `config list` included."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        found.update({f"{name} {sub}": body for sub, body in inner.items()} if inner else {name: command})
    return found


def options() -> str:
    """A section a command: what it does, and a table of its options."""
    lines = []
    for name, command in commands().items():
        lines += [f"### medim {name}", "", command.help or "", ""]
        lines += ["| option | meaning | default |", "| --- | --- | --- |"]
        for option in command.params:
            argument = option.param_type_name == "argument"
            words = [option.name.upper()] if argument else option.opts
            default = "" if option.default in (None, False) else f"`{option.default}`"
            shown = " ".join(f"`{word}`" for word in words)
            lines.append(f"| {shown} | {option.help or ''} | {'needed' if option.required else default} |")
        lines.append("")
    return "\n".join(lines)
