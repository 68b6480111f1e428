"""The probe of labelled training subjects, and the pairs of views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from medim.config import PretrainConfig, ViewsConfig
from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import Cohort, open_cohort
from medim.training.pretrain.online_probe import MIN_CLASS_SUBJECTS, AlignmentMetric, OnlineProbe, open_probe
from medim.types import Features

SIDE = 12
COUNTS = {"train": 60, "val": 16}


class Brightness(nn.Module):
    """Mean and deviation of an image, in evaluation mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: torch.Tensor) -> Features:
        assert not self.training
        flat = image.flatten(1) * self.weight
        return Features(maps=(), summary=torch.stack([flat.mean(1), flat.std(1)], dim=1))


def cohort(folder: Path, labels: dict[str, Any]) -> Cohort:
    """Images that are bright where `truth` is 1, under the labels that are given."""
    rng, arrays = np.random.default_rng(0), {}
    for part, count in COUNTS.items():
        truth = np.arange(count) % 2
        images = rng.integers(40, 80, (count, SIDE, SIDE)) + 120 * truth[:, None, None]
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels[part](truth)[:, None]}
    np.savez(folder / "pneumoniamnist.npz", **arrays)
    index: Index = build_index(folder / "pneumoniamnist.npz", "xray")
    return open_cohort(index, index.records, [], split_seed=0, store=folder / "store")


@pytest.fixture
def config(pretrain_config: PretrainConfig) -> PretrainConfig:
    views = ViewsConfig(shape=(SIDE, SIDE), augmentations=[{"op": "noise", "probability": 1.0}])
    return pretrain_config.model_copy(update={"views": views, "checkpoint_selection": "probe"})


def opened(config: PretrainConfig, found: Cohort) -> OnlineProbe | None:
    return open_probe(config, found, found.records("train"), seed=0)


def same(truth: Any) -> Any:
    return truth


def one_class(truth: Any) -> Any:
    return 0 * truth


def few(truth: Any) -> Any:
    return (np.arange(len(truth)) < MIN_CLASS_SUBJECTS - 1).astype(int)


def three(truth: Any) -> Any:
    return np.where(np.arange(len(truth)) < MIN_CLASS_SUBJECTS - 1, 2, truth)


def test_a_probe_tells_subjects_apart_where_features_do(config: PretrainConfig, tmp_path: Path) -> None:
    found = opened(config, cohort(tmp_path, {"train": same, "val": same}))
    assert found is not None
    measured = found(Brightness())
    assert measured["probe"] == 1
    assert measured["probe_error"] > 0, "a few cases without a mistake prove little"
    assert (found.protocol["n_neighbours"], found.protocol["n_queries"], found.n_labels) == (40, 20, 60)


@pytest.mark.parametrize("val", [one_class, lambda truth: 1 - truth])
def test_labels_to_measure_on_choose_nothing(config: PretrainConfig, tmp_path: Path, val: Any) -> None:
    found = opened(config, cohort(tmp_path, {"train": same, "val": val}))
    assert found is not None
    assert found(Brightness())["probe"] == 1


def test_subjects_that_are_asked_are_no_neighbours(config: PretrainConfig, tmp_path: Path) -> None:
    found = opened(config, cohort(tmp_path, {"train": same, "val": same}))
    assert found is not None
    neighbours, asked = (set(side._images.keys) for side in found._sides)
    assert not neighbours & asked


def test_a_run_that_selects_without_labels_has_no_probe(config: PretrainConfig, tmp_path: Path) -> None:
    found = cohort(tmp_path, {"train": same, "val": same})
    assert opened(config, found) is not None
    assert opened(config.model_copy(update={"checkpoint_selection": "loss"}), found) is None


def test_a_rare_class_is_left_out_and_the_others_are_probed(config: PretrainConfig, tmp_path: Path) -> None:
    found = opened(config, cohort(tmp_path, {"train": three, "val": same}))
    assert found is not None
    assert len(found.classes) == 2
    assert found(Brightness())["probe"] == 1


def test_a_probe_of_features_that_are_no_numbers_is_no_number(config: PretrainConfig, tmp_path: Path) -> None:
    found = opened(config, cohort(tmp_path, {"train": same, "val": same}))
    encoder = Brightness()
    nn.init.constant_(encoder.weight, float("nan"))
    assert found is not None
    assert np.isnan(found(encoder)["probe"])


@pytest.mark.parametrize("train", [one_class, few])
def test_there_is_no_probe_where_labels_do_not_suffice(config: PretrainConfig, tmp_path: Path, train: Any) -> None:
    assert opened(config, cohort(tmp_path, {"train": train, "val": same})) is None


def test_pairs_are_the_same_at_each_measurement_and_leave_the_runs_random_numbers_alone(
    config: PretrainConfig, tmp_path: Path
) -> None:
    found = cohort(tmp_path, {"train": same, "val": same})
    pairs = AlignmentMetric(config, found, found.records("val"), seed=0)
    state, encoder = torch.get_rng_state(), Brightness()
    first = pairs(encoder)
    assert first == pairs(encoder)
    assert encoder.training
    assert torch.equal(state, torch.get_rng_state())
    assert 0 < first["alignment"] < 0.1, "two noisy views of an image are near each other, and not the same"
    assert first["uniformity"] < 0
