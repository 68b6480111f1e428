from __future__ import annotations

from pathlib import Path

import pytest

from medim.deployment.export import export
from medim.deployment.package import Package
from tests.deployment.made import make_run


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    folder: Path = tmp_path_factory.mktemp("packages")
    codes = {"segmenter": "hippocampus", "classifier": None}
    return {
        kind: export(make_run(folder / f"{kind}-run", kind), folder / kind, labels_schema=schema)
        for kind, schema in codes.items()
    }
