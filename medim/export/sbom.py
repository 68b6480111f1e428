"""What the light runtime consists of on this machine, by the installed metadata: lock file and bill of materials."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medim.files import json_bytes
from medim.package.contract import Contract
from medim.types import UserError

LOCK, SBOM = "runtime/requirements.lock", "sbom.cdx.json"
LOCK_HEAD = """\
# What the gates of parity/report.json ran with: pip install --requirement requirements.lock
# Without hashes: of a package that is installed, nobody recorded those of its archive.
"""


def installed(name: str) -> str | None:
    """The version of a package here; None where it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def runtime() -> list[Distribution]:
    """The light install of medim with all that it needs, in the order of names.

    Raises:
        UserError: something of it is missing here.
    """
    found: dict[str, Distribution] = {}
    waiting = [("medim", "")]
    done = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        if installed(name) is None:
            raise UserError(
                f"export: expected the light runtime to be installed here, {name} is not. pip install medim"
            )
        found[name] = distribution(name)
        waiting += [(needed, option) for needed, options in _needs(found[name], extra) for option in options]
    return [found[name] for name in sorted(found)]


def lock() -> bytes:
    """Pinned requirements of the light runtime."""
    pins = [f"{canonicalize_name(one.metadata['Name'])}=={one.version}\n" for one in runtime()]
    return (LOCK_HEAD + "".join(pins)).encode()


def sbom(contract: Contract) -> bytes:
    """The bill of materials of the package and of the runtime that it was tested with: CycloneDX 1.6.

    It has neither a time nor a serial number, both optional, so that two exports are the same.
    """
    parts = runtime()
    model = {
        "type": "machine-learning-model",
        "bom-ref": "package",
        "name": contract.name,
        "version": contract.version,
        "description": contract.not_for,
        "hashes": [{"alg": "SHA-256", "content": contract.architecture["sha256"]}],
    }
    needs = {_purl(one): sorted({_purl(distribution(name)) for name, _ in _needs(one, "")}) for one in parts}
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": [_component(one) for one in parts],
        "dependencies": [
            {"ref": "package", "dependsOn": [purl for purl in needs if purl.startswith("pkg:pypi/medim@")]},
            *({"ref": purl, "dependsOn": below} for purl, below in needs.items()),
        ],
    }
    return json_bytes(content)


def _needs(one: Distribution, extra: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names that a package needs here, each with the extras that it asks for beside none."""
    for line in one.requires or ():
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            yield canonicalize_name(needed.name), ("", *sorted(needed.extras))


def _component(one: Distribution) -> dict[str, object]:
    purl, licence = _purl(one), _licence(one)
    licences = {"licenses": [{"license": {"name": licence}}]} if licence else {}
    return {"type": "library", "bom-ref": purl, "name": one.metadata["Name"], "version": one.version} | {
        **licences,
        "purl": purl,
    }


def _purl(one: Distribution) -> str:
    return f"pkg:pypi/{canonicalize_name(one.metadata['Name'])}@{one.version}"


def _licence(one: Distribution) -> str | None:
    """As the package tells it: an SPDX expression, a classifier, or one line of text."""
    told = {name: one.metadata.get_all(name) or [""] for name in ("License-Expression", "Classifier", "License")}
    classifiers = [c.split(" :: ")[-1] for c in told["Classifier"] if c.startswith("License ::")]
    (text,) = told["License"]
    plain = text if re.fullmatch(r"[^\n]{1,100}", text) else None
    return told["License-Expression"][0] or ", ".join(classifiers) or plain
