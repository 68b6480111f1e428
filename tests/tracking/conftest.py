from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.evaluation.conftest import segmenter
from tests.tracking.server import Server
from tests.training.conftest import cohort_index, finetune_config, pretrain_config, volumes

__all__ = ["cohort_index", "finetune_config", "pretrain_config", "segmenter", "volumes"]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    yield made
    made.stop()
