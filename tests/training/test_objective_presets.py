"""Each objective's test preset learns on real images in its 200 steps, in 2D and 3D."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from medim.config import list_presets, load_config
from medim.data.index.index import build_index
from medim.training.pretrain.run import pretrain

pytestmark = pytest.mark.slow
DATA = {"xray": "xray-pneumonia/pneumoniamnist.npz", "mri": "mri-hippocampus"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.mark.parametrize("name", [name for name in list_presets("pretrain") if name.startswith("test-")])
def test_a_test_preset_ends_below_chance_on_subjects_it_has_not_seen(
    name: str, shared_data: Path, store: Path, tmp_path: Path
) -> None:
    logging.disable(logging.INFO)
    config = load_config("pretrain", name)
    summary = pretrain(config, build_index(shared_data / DATA[config.modality], config.modality), tmp_path, store=store)
    levels = {term: chance for term, chance in summary["chance"].items() if chance is not None}
    assert levels
    for term, chance in levels.items():
        assert summary["loss"][term]["val"] < chance
    assert summary["verdict"] == "learning"
