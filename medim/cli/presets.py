"""Print a preset as YAML in which each value is preceded by its description from the code."""

from __future__ import annotations

import contextlib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from medim.config import AUTO, CONFIG_CLASSES, Section, ViewsConfig, list_presets, read_config, unknown_preset_message
from medim.renamed_keys import translate_preset
from medim.types import UsageError

OptionTables = dict[str, Mapping[str, Callable[..., Any]]]  # config key: the table its sections name entries of
WIDTH = 120


def render_preset(name: str) -> str:
    """Render the header of a preset, then every key and option with description and value, including defaults.

    Raises:
        UsageError: no such preset.
    """
    texts = []
    name = translate_preset(name)
    for command, kind in CONFIG_CLASSES.items():
        path = list_presets(command).get(name)
        if path is None:
            continue
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        tables, rules = _load_tables()
        for key, value in _fill_defaults(kind, read_config(command, name)).items():
            header += ["", *_render_item(key, value, kind.model_fields[key].description, tables, rules, key_path=key)]
        texts.append("\n".join(header))
    if not texts:
        preset_names = [preset for command in CONFIG_CLASSES for preset in list_presets(command)]
        raise UsageError(f"config show: {unknown_preset_message('preset', name, preset_names)}")
    return "\n".join(texts)


def parse_docstring(entry: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """First paragraph of a docstring, and the descriptions of its `Args`."""
    text = inspect.getdoc(entry) or ""
    args_block = re.search(r"^Args:\n((?:    .*\n?)*)", text, re.MULTILINE)
    arg_entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", args_block[1] if args_block else "", re.MULTILINE)
    return " ".join(text.split("\n\n")[0].split()), {name: " ".join(meaning.split()) for name, meaning in arg_entries}


def _load_tables() -> tuple[OptionTables, dict[str, str]]:
    """Tables and rules of `auto` values; the light installation has only some of them."""
    from medim.data.preprocessing.steps import STEPS
    from medim.inference.network import INFERENCES

    tables: OptionTables = {"preprocessing": STEPS, "inference": INFERENCES}
    with contextlib.suppress(ModuleNotFoundError):
        from medim.data.loading.augmentations import AUGMENTATIONS
        from medim.models.critics import CRITICS
        from medim.models.decoders import DECODERS
        from medim.models.encoders import ENCODERS
        from medim.models.heads import HEADS
        from medim.objectives import OBJECTIVES
        from medim.training.auto_config import AUTO_RULES

        tables |= {"encoder": ENCODERS, "decoder": DECODERS, "head": HEADS, "critic": CRITICS}
        return tables | {"objectives": OBJECTIVES, "augmentations": AUGMENTATIONS}, AUTO_RULES
    return tables, {}


def _fill_defaults(kind: type[BaseModel], content: Section) -> Section:
    """Content in the order of the keys of the configuration, completed with defaults."""
    full = {
        key: content.get(key, field.get_default(call_default_factory=True)) for key, field in kind.model_fields.items()
    }
    return full | ({"views": _fill_defaults(ViewsConfig, full["views"])} if "views" in full else {})


def _render_item(
    key: str, value: Any, meaning: str | None, tables: OptionTables, rules: Mapping[str, str], key_path: str
) -> list[str]:
    """Render a key as YAML lines: description and value."""
    lines = _wrap_comment(meaning)
    if value == AUTO:
        lines += _wrap_comment(f"auto: {rules.get(key_path, 'follows the median image of the index')}")
    if isinstance(value, dict):
        return [*lines, f"{key}:", *_indent_lines(_render_section(key, value, tables, rules))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [_dash_lines(_render_section(key, entry, tables, rules)) for entry in value]
        return [*lines, f"{key}:", *_indent_lines([line for entry in entries for line in entry])]
    flow_style = None if isinstance(value, list | tuple) else False  # a list stands in one line
    return [*lines, *yaml.safe_dump({key: value}, default_flow_style=flow_style, width=WIDTH).splitlines()]


def _render_section(key: str, section: Section, tables: OptionTables, rules: Mapping[str, str]) -> list[str]:
    """Render a section as lines: description of the entry, then each option."""
    entry = next((name for name in ("name", "op", "mode") if name in section), "")
    path_prefix = section[entry] if entry == "op" else key
    meanings = {name: field.description or "" for name, field in ViewsConfig.model_fields.items()}
    if key in tables:
        summary, meanings = parse_docstring(tables[key][section[entry]])
        meanings |= {entry: summary, "weight": "what the loss counts beside the others"}
    return [
        line
        for name, value in section.items()
        for line in _render_item(name, value, meanings.get(name), tables, rules, f"{path_prefix}.{name}")
    ]


def _wrap_comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", WIDTH - 10, initial_indent="# ", subsequent_indent="# ")


def _indent_lines(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _dash_lines(lines: list[str]) -> list[str]:
    """Render a section as a list item: comment, then a dash before the first key."""
    first = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return [*lines[:first], f"- {lines[first]}", *_indent_lines(lines[first + 1 :])]
