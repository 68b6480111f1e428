"""Ailments that are planted in shipped presets get their verdict, and healthy runs get none of them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medim.data.index.index import Index, build_index
from medim.data.loading.datasets import _ImageBoxes
from medim.training.pretrain.config import resolve_pretrain_config
from medim.training.pretrain.run import pretrain
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features

pytestmark = pytest.mark.slow
IMAGES = {"train": 320, "val": 80}
XRAY = "test-2d-local-dim"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def xrays(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return some(shared_data, tmp_path_factory.mktemp("xrays"))


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views hold nothing; an index would refuse images that are constant."""
    cut = _ImageBoxes.cut_box
    monkeypatch.setattr(_ImageBoxes, "cut_box", lambda *args, **options: 0 * cut(*args, **options))


def some(shared_data: Path, folder: Path) -> Index:
    """A few hundred of the X-rays."""
    arrays = {}
    with np.load(shared_data / "xray-pneumonia" / "pneumoniamnist.npz") as found:
        for part, count in IMAGES.items():
            arrays[f"{part}_images"] = found[f"{part}_images"][:count]
            arrays[f"{part}_labels"] = found[f"{part}_labels"][:count]
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    return build_index(folder / "pneumoniamnist.npz", "xray")


def run(name: str, index: Index, out: Path, store: Path, *settings: str, stop: bool = False) -> dict[str, Any]:
    logging.disable(logging.INFO)
    config = resolve_pretrain_config(name, settings)
    return pretrain(config, index, out, store=store, stop_on_collapse=stop)


@pytest.mark.parametrize(
    "name",
    [XRAY, "test-2d-simclr", "test-2d-reconstruction", "test-2d-coordinates", "test-2d-dense-dim"],
)
def test_a_healthy_run_of_a_shipped_preset_gets_no_bad_verdict(
    name: str, xrays: Index, store: Path, tmp_path: Path
) -> None:
    summary = run(name, xrays, tmp_path, store, "checkpoint_every_steps=100")
    assert [said["verdict"] for said in summary["verdict_changes"]] == ["learning"]
    assert summary["verdict"] == "learning"
    assert summary["advice"] == ""


def test_a_learning_rate_of_all_but_zero_is_told_as_at_chance(xrays: Index, store: Path, tmp_path: Path) -> None:
    assert ailment(run(XRAY, xrays, tmp_path, store, "lr=1e-30", "max_steps=60")) == "at-chance"


def test_summaries_paired_with_the_maps_of_another_image_are_told_as_at_chance(
    xrays: Index, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = StepEncoder.__call__

    def shuffled(self: StepEncoder, image: torch.Tensor) -> Features:
        features = encode(self, image)
        return dataclasses.replace(features, summary=features.summary.roll(2, dims=0))  # an image has two views

    monkeypatch.setattr(StepEncoder, "__call__", shuffled)
    assert ailment(run(XRAY, xrays, tmp_path, store, "max_steps=100")) == "at-chance"


def test_blank_images_are_told_as_collapsed(xrays: Index, blank: None, store: Path, tmp_path: Path) -> None:
    assert ailment(run(XRAY, xrays, tmp_path, store, "max_steps=60")) == "collapsed"


def test_a_huge_weight_decay_is_told_as_collapsed(xrays: Index, store: Path, tmp_path: Path) -> None:
    config = resolve_pretrain_config(XRAY)
    assert ailment(run(XRAY, xrays, tmp_path, store, f"weight_decay={0.4 / config.lr}", "max_steps=100")) == "collapsed"


def test_a_learning_rate_thousands_of_times_too_high_is_told_as_diverged(
    xrays: Index, store: Path, tmp_path: Path
) -> None:
    lr = 2_500 * resolve_pretrain_config(XRAY).lr
    assert ailment(run(XRAY, xrays, tmp_path, store, f"lr={lr}", "max_steps=60")) == "diverged"


def test_a_collapsed_run_ends_where_it_is_seen_if_that_was_asked_for(
    xrays: Index, blank: None, store: Path, tmp_path: Path
) -> None:
    summary = run(XRAY, xrays, tmp_path, store, "checkpoint_every_steps=20", stop=True)
    assert (summary["steps"], summary["verdict"]) == (20, "collapsed")


def ailment(summary: dict[str, Any]) -> str:
    """The last verdict, said within 300 steps, once, and with what to try."""
    said = summary["verdict_changes"][-1]
    assert said["step"] <= 300
    assert said["verdict"] == summary["verdict"]
    assert summary["advice"]
    return str(said["verdict"])
