from __future__ import annotations

import re
from importlib.metadata import version

import pytest

from medim.export import sbom
from medim.export.sbom import LOCK, SBOM, runtime_packages
from medim.files import read_json
from medim.package.package import Package
from medim.types import UserError

HEAVY = {"torch", "monai", "lightning", "mlflow", "pandas", "pyarrow"}


def test_the_lock_file_pins_the_light_runtime_and_nothing_else(packages: dict[str, Package]) -> None:
    lines = packages["encoder"].read_file(LOCK).decode().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {
        "medim-infomax",
        "numpy",
        "onnxruntime",
        "pydicom",
        "packaging",
    } <= pins.keys()  # packaging: somebody else needs it
    assert not HEAVY & pins.keys()
    assert all(version(name) == pin for name, pin in pins.items())


def test_the_bill_of_materials_has_what_cyclonedx_asks_for(packages: dict[str, Package]) -> None:
    bill = read_json(packages["encoder"].folder / SBOM)
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    parts = [bill["metadata"]["component"], *bill["components"]]
    assert all({"type", "name", "version", "bom-ref"} <= part.keys() for part in parts)
    refs = [part["bom-ref"] for part in parts]
    assert len(set(refs)) == len(refs)
    assert all(re.fullmatch(r"pkg:pypi/[a-z0-9-]+@[^@]+", part["purl"]) for part in bill["components"])
    assert all("name" in one["license"] for part in bill["components"] for one in part.get("licenses", []))
    edges = {edge["ref"]: edge["dependsOn"] for edge in bill["dependencies"]}
    assert edges.keys() == set(refs)
    assert {below for needs in edges.values() for below in needs} <= set(refs)
    assert len(edges["package"]) == 1  # medim
    assert parts[0]["hashes"][0]["content"] == packages["encoder"].contract.architecture["sha256"]


def test_a_runtime_that_is_not_whole_stops_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom, "find_version", lambda name: None if name == "scipy" else "1")
    with pytest.raises(UserError, match="scipy, which the light runtime requires, is not installed"):
        runtime_packages()
