"""A preset as a user may read and copy it: every value under its meaning, taken from where the meaning is defined."""

from __future__ import annotations

import contextlib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from medim.config import AUTO, KINDS, Section, ViewsConfig, presets, read, unknown
from medim.types import UsageError

Tables = dict[str, Mapping[str, Callable[..., Any]]]  # config key: the table its sections name entries of
WIDTH = 120


def show(name: str) -> str:
    """A preset's header, then every key and option with its meaning and its value, the keys' defaults too.

    Raises:
        UsageError: no such preset.
    """
    texts = []
    for command, kind in KINDS.items():
        path = presets(command).get(name)
        if path is None:
            continue
        header = [line for line in path.read_text().splitlines() if line.startswith("#")]
        tables, rules = _known()
        for key, value in _with_defaults(kind, read(command, name)).items():
            header += ["", *_item(key, value, kind.model_fields[key].description, tables, rules, at=key)]
        texts.append("\n".join(header))
    if not texts:
        raise UsageError(f"config show: {unknown('preset', name, [n for command in KINDS for n in presets(command)])}")
    return "\n".join(texts)


def documented(entry: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """First paragraph of a docstring, and what its `Args` say of each parameter."""
    text = inspect.getdoc(entry) or ""
    block = re.search(r"^Args:\n((?:    .*\n?)*)", text, re.MULTILINE)
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", block[1] if block else "", re.MULTILINE)
    return " ".join(text.split("\n\n")[0].split()), {name: " ".join(said.split()) for name, said in found}


def _known() -> tuple[Tables, dict[str, str]]:
    """The tables, and the rules of `auto`; the light install has only some of them."""
    from medim.data.preprocessing.steps import STEPS
    from medim.inference.network import INFERENCES

    tables: Tables = {"preprocessing": STEPS, "inference": INFERENCES}
    with contextlib.suppress(ModuleNotFoundError):
        from medim.data.loading.augmentations import AUGMENTATIONS
        from medim.models.critics import CRITICS
        from medim.models.decoders import DECODERS
        from medim.models.encoders import ENCODERS
        from medim.models.heads import HEADS
        from medim.objectives import OBJECTIVES
        from medim.training.auto_config import RULES

        tables |= {"encoder": ENCODERS, "decoder": DECODERS, "head": HEADS, "critic": CRITICS}
        return tables | {"objectives": OBJECTIVES, "augmentations": AUGMENTATIONS}, RULES
    return tables, {}


def _with_defaults(kind: type[BaseModel], content: Section) -> Section:
    """The content in the order of the model's keys, with a default for each key it leaves out."""
    full = {
        key: content.get(key, field.get_default(call_default_factory=True)) for key, field in kind.model_fields.items()
    }
    return full | ({"views": _with_defaults(ViewsConfig, full["views"])} if "views" in full else {})


def _item(key: str, value: Any, meaning: str | None, tables: Tables, rules: Mapping[str, str], at: str) -> list[str]:
    """The lines of a key: its meaning and its value, as YAML."""
    lines = _comment(meaning)
    if value == AUTO:
        lines += _comment(f"auto: {rules.get(at, 'follows the median image of the index')}")
    if isinstance(value, dict):
        return [*lines, f"{key}:", *_indented(_section(key, value, tables, rules))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        entries = [_dashed(_section(key, entry, tables, rules)) for entry in value]
        return [*lines, f"{key}:", *_indented([line for entry in entries for line in entry])]
    flow = None if isinstance(value, list | tuple) else False  # a list stands in one line
    return [*lines, *yaml.safe_dump({key: value}, default_flow_style=flow, width=WIDTH).splitlines()]


def _section(key: str, section: Section, tables: Tables, rules: Mapping[str, str]) -> list[str]:
    """The lines of a section: what its entry is, then each option."""
    entry = next((name for name in ("name", "op", "mode") if name in section), "")
    place = section[entry] if entry == "op" else key
    meanings = {name: field.description or "" for name, field in ViewsConfig.model_fields.items()}
    if key in tables:
        summary, meanings = documented(tables[key][section[entry]])
        meanings |= {entry: summary, "weight": "what the loss counts beside the others"}
    return [
        line
        for name, value in section.items()
        for line in _item(name, value, meanings.get(name), tables, rules, f"{place}.{name}")
    ]


def _comment(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", WIDTH - 10, initial_indent="# ", subsequent_indent="# ")


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _dashed(lines: list[str]) -> list[str]:
    """A section as an item of a list: the dash stands before its first key, the comment on it above."""
    first = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    return [*lines[:first], f"- {lines[first]}", *_indented(lines[first + 1 :])]
