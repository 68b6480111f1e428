"""No dependency obliges a hospital to open its own sources: nothing under the GPL in any list."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
GPL = re.compile(r"\b[AL]?GPL|General Public", re.IGNORECASE)


def listed() -> set[str]:
    """Every distribution that pyproject.toml or constraints.txt names."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = [line for lines in lists for line in lines]
    lines += [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}  # type: ignore[index]


def licence(name: str) -> str:
    """What a distribution says of its licence, in its first lines; nothing where it is not installed."""
    try:
        said = metadata(name)
    except PackageNotFoundError:
        return ""
    classifiers = [line for line in said.get_all("Classifier") or [] if line.startswith("License")]
    return "\n".join([said.get("License-Expression") or "", (said.get("License") or "")[:200], *classifiers])


def test_no_dependency_is_under_the_gpl() -> None:
    names = listed()
    assert len(names) > 100
    assert {name: licence(name) for name in names if GPL.search(licence(name))} == {}
    assert "pylibjpeg-libjpeg" not in names  # GPL-3: the JPEG decoder of pylibjpeg that GDCM stands in for


def test_a_gpl_is_seen() -> None:
    for text in ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "GPL-3.0-only", "LGPL-2.1"):
        assert GPL.search(text)
    assert not GPL.search("MIT License")
