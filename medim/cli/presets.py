"""Print, copy and compare configurations: YAML in which each value is preceded by its description from the code."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from medim.config import (
    AUTO,
    CONFIG_CLASSES,
    Command,
    Section,
    ViewsConfig,
    list_presets,
    read_config,
    unknown_name_message,
    unknown_preset_message,
)
from medim.files import write_text
from medim.renamed_keys import translate_preset
from medim.types import UsageError, UserError

OptionTables = dict[str, Mapping[str, Callable[..., Any]]]  # config key: the table its sections name entries of
WIDTH = 120
START_PRESETS: tuple[tuple[Command, str], ...] = (  # of `medim config list` without --all
    ("pretrain", "mri-demo"),
    ("pretrain", "mri"),
    ("pretrain", "xray"),
    ("finetune", "mri-segmentation"),
    ("finetune", "xray-classification"),
)


def render_preset(name: str) -> str:
    """Render the header of a preset, then every key and option with description and value, including defaults.

    Raises:
        UsageError: no such preset.
    """
    return render_config(name)


def render_config(name: str, content: Section | None = None) -> str:
    """Render a configuration with its header: every key and option with description and value, including defaults.

    Args:
        name: name of a preset, path of a YAML file, or folder of a run.
        content: resolved content; None takes the values of `name`, where `auto` may be left.

    Raises:
        UsageError: no such preset or file, or it contains unknown keys.
    """
    command, path, values = _read_any_config(name)
    kind = CONFIG_CLASSES[command]
    lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
    tables, rules = _load_tables()
    for key, value in _fill_defaults(kind, values if content is None else content).items():
        lines += ["", *_render_item(key, value, kind.model_fields[key].description, tables, rules, key_path=key)]
    return "\n".join(lines)


def read_preset_title(path: Path) -> str:
    """Read the first sentence of the header of a preset."""
    lines = itertools.takewhile(lambda line: line.startswith("# ") and line[2] != " ", path.read_text().splitlines())
    text = " ".join(line.removeprefix("# ") for line in lines)
    return re.split(r"(?<=[\w)`]\.) (?=[A-Za-z])", text, maxsplit=1)[0]


def resolve_content(name: str, data: Path) -> Section:
    """Resolve the `auto` values of a configuration for the images of a source.

    Raises:
        UsageError: see `render_config`.
        UserError: the images cannot be read.
    """
    from medim.data.source import open_source
    from medim.training.auto_config import resolve_run_config

    command, _, content = _read_any_config(name)
    index, _ = open_source(data, content["modality"])
    return resolve_run_config(command, content, index, where=name).model_dump(mode="json")


def copy_config(name: str, file: Path) -> None:
    """Copy a configuration into a new file, with descriptions.

    Raises:
        UserError: the file exists.
        UsageError: see `render_config`.
    """
    text = render_config(name)
    if file.exists():
        raise UserError(f"{file}: this file exists. Choose another name, or delete it.")
    write_text(file, text + "\n")


def compare_configs(first: str, second: str) -> dict[str, str]:
    """List the dotted keys in which two configurations differ, with both values."""
    flat = []
    for name in (first, second):
        command, _, content = _read_any_config(name)
        flat.append(dict(_list_values(_fill_defaults(CONFIG_CLASSES[command], content))))
    keys = dict.fromkeys([*flat[0], *flat[1]])
    pairs = {key: tuple(str(values.get(key, "-")) for values in flat) for key in keys}
    return {key: f"{one} -> {other}" for key, (one, other) in pairs.items() if one != other}


def _list_values(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List all values by dotted key; items of a list of sections have the name of the section."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        items = ((str(item.get("name") or item.get("op") or place), item) for place, item in enumerate(content))
    else:
        yield prefix, list(content) if isinstance(content, tuple) else content
    for key, value in items:
        yield from _list_values(value, f"{prefix}.{key}" if prefix else key)


def _read_any_config(name: str) -> tuple[Command, Path, Section]:
    """Read a preset, a YAML file or the configuration of a run; return its command, file and content.

    Raises:
        UsageError: there is none, it has keys of no command, or a value of the wrong form.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    presets = {command: list_presets(command) for command in CONFIG_CLASSES}
    if translate_preset(name) in {preset for names in presets.values() for preset in names}:
        command = next(command for command, names in presets.items() if translate_preset(name) in names)
        return command, presets[command][translate_preset(name)], read_config(command, name)
    if not path.is_file():
        preset_names = [preset for names in presets.values() for preset in names]
        raise UsageError(f"config: {unknown_preset_message('preset or file', name, preset_names)}")
    problem: UsageError | None = None
    for command, kind in CONFIG_CLASSES.items():
        try:
            content = read_config(command, str(path))
        except UsageError as error:  # such as a preset of the other command that it extends
            problem = problem or error
            continue
        if unknown_keys := sorted(content.keys() - kind.model_fields.keys()):
            problem = UsageError(f"{name}: {unknown_name_message('key', unknown_keys[0], kind.model_fields)}")
        else:
            with contextlib.suppress(ModuleNotFoundError):  # the light installation has no networks to check
                from medim.training.auto_config import resolve_run_config

                resolve_run_config(command, content, None, where=name)
            return command, path, content
    raise problem or UsageError(f"{name}: expected a configuration of pretrain or finetune.")


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
