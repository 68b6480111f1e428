"""Answers to the fields of a model card that a run does not record, from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from medim.config import read_yaml_mapping, suggest_name
from medim.package.model_card import FIELDS, CardFields
from medim.types import UsageError

MAX_TEXT_LENGTH = 5000
_CONTROL_CHARACTER = re.compile(r"[^\S \n]|[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def read_card_answers(path: Path) -> dict[str, CardFields]:
    """Read the answers: {section: {field: value}}, with the sections and fields of `medim.package.model_card.FIELDS`.

    Args:
        path: YAML file. A value is text, a number, or a list of these, which are joined by semicolons.

    Returns:
        Answers by section and field, without fields that are empty.

    Raises:
        UsageError: the file cannot be read, a section or field does not exist, or a value is something else or too
            long.
    """
    answers: dict[str, CardFields] = {}
    for section, fields in read_yaml_mapping(path).items():
        if section not in FIELDS:
            raise UsageError(
                f"{path}: no section {section!r} in a model card.{suggest_name(section, list(FIELDS))} "
                f"There are: {', '.join(FIELDS)}."
            )
        if not isinstance(fields, Mapping):
            raise UsageError(f"{path}: {section}: expected fields with their values, got {fields!r}.")
        for name, value in fields.items():
            if name not in FIELDS[section]:
                names = list(FIELDS[section])
                raise UsageError(
                    f"{path}: no field {name!r} in section {section}.{suggest_name(str(name), names)} "
                    f"There are: {', '.join(names)}."
                )
            if value not in (None, ""):
                answers.setdefault(section, {})[name] = _format_answer(value, f"{path}: {section}: {name}")
    return answers


def check_card_text(text: str, source: str) -> str:
    """Check the length and the characters of a text of the card, and remove spaces around it.

    Raises:
        UsageError: the text is empty, too long, or contains control characters.
    """
    text = text.strip()
    if not text or len(text) > MAX_TEXT_LENGTH:
        raise UsageError(
            f"{source}: expected text of 1 to {MAX_TEXT_LENGTH} characters, got {len(text)}. Correct the text."
        )
    if match := _CONTROL_CHARACTER.search(text):
        raise UsageError(f"{source}: expected text without control characters, got {match[0]!r}. Remove it.")
    return text


def _format_answer(value: object, source: str) -> str | int | float:
    if isinstance(value, list) and value:
        return check_card_text("; ".join(str(_format_answer(item, source)) for item in value), source)
    if isinstance(value, str):
        return check_card_text(value, source)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise UsageError(f"{source}: expected text, a number or a list of these, got {value!r}. Put text in quotes.")
