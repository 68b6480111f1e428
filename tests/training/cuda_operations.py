"""Operations that raise an error on a CUDA device, as medim trains there: with deterministic algorithms."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

LIST = Path(__file__).with_name("nondeterministic_operations.yaml")
CONDITIONS = {
    "floating": lambda arguments: arguments["self"].is_floating_point or arguments["self"].is_complex,
    "quantized": lambda arguments: "qint" in str(arguments["self"]) or "quint" in str(arguments["self"]),
    "mode_max": lambda arguments: arguments["mode"] == 2,
    "weights": lambda arguments: arguments.get("weights") is not None,
    "reduce_prod": lambda arguments: arguments["reduce"] == "prod",
}
Operation = tuple[str, dict[str, Any]]  # name, and arguments by name; a tensor is its dtype


def read_list() -> dict[str, Any]:
    """Read the list of operations, for the installed PyTorch.

    Raises:
        RuntimeError: the installed PyTorch is newer than the list.
    """
    content: dict[str, Any] = yaml.safe_load(LIST.read_text())
    if _parse_version(torch.__version__) > _parse_version(content["torch"]):
        raise RuntimeError(
            f"{LIST.name} is the list of PyTorch {content['torch']}, and {torch.__version__} is installed. Compare it "
            "with the documentation of torch.use_deterministic_algorithms, and set its `torch`."
        )
    return content


def _parse_version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def documented_names() -> list[str]:
    """List what the documentation of the installed PyTorch says raises an error."""
    text = str(torch.use_deterministic_algorithms.__doc__)
    _, _, text = text.partition("operations will throw a\n")
    text, _, _ = text.partition("In addition, several operations")
    return list(dict.fromkeys(re.findall(r"^ +\* :\w+:`(.+?)`", text, re.MULTILINE)))


def find_forbidden(operations: Iterable[Operation]) -> list[str]:
    """List the operations that raise an error on a CUDA device, each with the documented name.

    A name of the list with a dot is one overload, any other all overloads of the operation.
    """
    content = read_list()
    entries = [
        (operation, entry.get("only"), entry["name"])
        for entry in [*content["documented"], *content["undocumented"]]
        for operation in entry["operations"]
    ]
    return sorted(
        {
            f"{name} ({documented})"
            for name, arguments in operations
            for operation, only, documented in entries
            if operation in (name, name.partition(".")[0]) and (only is None or CONDITIONS[only](arguments))
        }
    )
