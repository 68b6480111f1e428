from __future__ import annotations

from pathlib import Path

import pytest

from medim.node.settings import Address, NodeSettings
from medim.node.spool import Spool


@pytest.fixture
def settings(tmp_path: Path) -> NodeSettings:
    """A node on an ephemeral port of the loopback, in a new spool."""
    return NodeSettings(
        package=tmp_path / "package",
        package_sha256="0" * 64,
        modality="mri",
        spool=tmp_path / "spool",
        listen=Address(host="127.0.0.1", port=0),
        ae_title="MEDIM",
        min_free_bytes=0,
    )


@pytest.fixture
def spool(settings: NodeSettings) -> Spool:
    place = Spool(settings.spool)
    place.create()
    return place
