from __future__ import annotations

from pathlib import Path

import pytest

from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.package.package import Package
from tests.export.packages import make_run


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    folder: Path = tmp_path_factory.mktemp("packages")
    codes = {"segmenter": "hippocampus", "classifier": None}
    return {
        kind: export(make_run(folder / f"{kind}-run", kind), folder / kind, ExportOptions(label_codes=schema))
        for kind, schema in codes.items()
    }
