"""Lock file and software bill of materials (SBOM) of the light runtime, from the metadata of installed packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from medim.files import encode_json
from medim.package.contract import Contract
from medim.types import UserError
from medim.version import DISTRIBUTION, install_command

LOCK, SBOM = "runtime/requirements.lock", "sbom.cdx.json"
LOCK_HEADER = """\
# Versions used for the gates of parity/report.json: pip install --requirement requirements.lock
# Without hashes: an installed package does not record the hash of its archive.
"""


def find_version(name: str) -> str | None:
    """Find the version of an installed package; None if it is not installed."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def runtime_packages() -> list[Distribution]:
    """List the packages of the light install of medim with all dependencies, sorted by name.

    Raises:
        UserError: a package is not installed.
    """
    packages: dict[str, Distribution] = {}
    queue = [(DISTRIBUTION, "")]
    visits = set()
    while queue:
        name, extra = queue.pop()
        if (name, extra) in visits:
            continue
        visits.add((name, extra))
        if find_version(name) is None:
            raise UserError(
                f"export: {name}, which the light runtime requires, is not installed. Run: {install_command()}"
            )
        packages[name] = distribution(name)
        queue += [
            (dependency, dependency_extra)
            for dependency, extras in _list_requirements(packages[name], extra)
            for dependency_extra in extras
        ]
    return [packages[name] for name in sorted(packages)]


def lock_file() -> bytes:
    """Build the lock file: pinned requirements of the light runtime."""
    pins = [f"{canonicalize_name(package.metadata['Name'])}=={package.version}\n" for package in runtime_packages()]
    return (LOCK_HEADER + "".join(pins)).encode()


def build_sbom(contract: Contract) -> bytes:
    """Build the SBOM of a package and of the runtime used for its tests, in CycloneDX 1.6.

    The optional time and serial number are omitted, so that exports are reproducible.
    """
    packages = runtime_packages()
    model = {
        "type": "machine-learning-model",
        "bom-ref": "package",
        "name": contract.name,
        "version": contract.version,
        "description": contract.not_for,
        "hashes": [{"alg": "SHA-256", "content": contract.spec.sha256}],
    }
    dependencies = {
        _format_purl(package): sorted({_format_purl(distribution(name)) for name, _ in _list_requirements(package, "")})
        for package in packages
    }
    content = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": model},
        "components": [_build_component(package) for package in packages],
        "dependencies": [
            {
                "ref": "package",
                "dependsOn": [purl for purl in dependencies if purl.startswith(f"pkg:pypi/{DISTRIBUTION}@")],
            },
            *({"ref": purl, "dependsOn": purls} for purl, purls in dependencies.items()),
        ],
    }
    return encode_json(content)


def _list_requirements(package: Distribution, extra: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """List the dependencies of a package on this machine, each with its extras; the empty extra is always included."""
    for line in package.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield canonicalize_name(requirement.name), ("", *sorted(requirement.extras))


def _build_component(package: Distribution) -> dict[str, object]:
    purl, licence = _format_purl(package), _read_licence_name(package)
    licences = {"licenses": [{"license": {"name": licence}}]} if licence else {}
    return {"type": "library", "bom-ref": purl, "name": package.metadata["Name"], "version": package.version} | {
        **licences,
        "purl": purl,
    }


def _format_purl(package: Distribution) -> str:
    return f"pkg:pypi/{canonicalize_name(package.metadata['Name'])}@{package.version}"


def _read_licence_name(package: Distribution) -> str | None:
    """Read the licence from package metadata: SPDX expression, classifiers, or one line of text."""
    fields = {name: package.metadata.get_all(name) or [""] for name in ("License-Expression", "Classifier", "License")}
    classifiers = [c.split(" :: ")[-1] for c in fields["Classifier"] if c.startswith("License ::")]
    (text,) = fields["License"]
    plain = text if re.fullmatch(r"[^\n]{1,100}", text) else None
    return fields["License-Expression"][0] or ", ".join(classifiers) or plain
