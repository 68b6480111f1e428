"""The statistics of the out-of-distribution detector, and the limits that held-out subjects set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import open_cohort
from medim.files import write_bytes
from medim.inference.network import run_inference
from medim.inference.ood import FEATURE_GROUPS, MAX_WINDOWS, OOD_FILE, FeatureRecorder, OODDetector, OODFeatures
from medim.training.fit_ood import conformal_thresholds, fit_detector, fit_gaussian, save_ood_detector, window_features
from medim.types import Array, Features, Volume
from tests.specs import make_spec

SPEC = {"encoder": {"name": "unet"}, "in_channels": 1, "spatial_dims": 3, "input_shape": [8, 8, 8]}
STEPS = [{"op": "normalise"}]


class Means(nn.Module):
    """An encoder whose summary and map are the image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, image: torch.Tensor) -> Features:
        return Features((image * self.weight,), image.flatten(2).std(dim=2))


def rows_like(count: int, seed: int, sides: int = 6) -> list[OODFeatures]:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((sides, sides))
    return [{part: mix @ rng.standard_normal(sides) for part in FEATURE_GROUPS} for _ in range(count)]


def names(count: int, images: int = 1) -> list[str]:
    return [f"s-{i // images}" for i in range(count)]


def test_the_correlation_is_shrunk_and_the_floor_bounds_the_precision() -> None:
    rows = np.stack([row["features"] for row in rows_like(20, 0, sides=8)])
    found = fit_gaussian(rows, 0.0)
    unit = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    sample = unit.T @ unit / len(unit)
    estimate = np.linalg.inv(found.precision)
    off_diagonal = ~np.eye(8, dtype=bool)
    ratio = estimate[off_diagonal] / sample[off_diagonal]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
    assert 0 < ratio[0] < 1
    np.testing.assert_allclose(np.diag(estimate), 1.0, rtol=1e-6)
    rows[:, 0] = np.random.default_rng(0).normal(0, 1e-4, 20)  # hardly differs between the images
    floored = fit_gaussian(rows, 0.02)
    assert floored.scale[0] == 0.02
    np.testing.assert_allclose(np.diag(np.linalg.inv(floored.precision)), 1.0, rtol=1e-2)


@pytest.mark.parametrize(("subjects", "method"), [(60, "conformal"), (12, "normal")])
def test_about_one_fresh_image_in_twenty_gets_the_flag(subjects: int, method: str) -> None:
    alarms = []
    for seed in range(20):
        held_out = rows_like(subjects, 2 * seed + 1)
        reference = fit_detector(rows_like(200, 2 * seed), names(200), held_out, names(subjects))
        assert reference.method == method
        alarms.append(np.mean([reference.score(row).ood for row in rows_like(200, 1000 + seed)]))
    assert 0 < np.mean(alarms) < 0.065


def test_what_lies_far_off_in_any_one_part_is_flagged_by_that_part() -> None:
    reference = fit_detector(rows_like(100, 0), names(100), rows_like(30, 1), names(30))
    for part in FEATURE_GROUPS:
        row = rows_like(1, 2)[0]
        row[part] = row[part] + 50
        verdict = reference.score(row)
        assert (verdict.ood, verdict.feature_group) == (True, part)


@pytest.mark.parametrize(("side", "windows"), [(20, MAX_WINDOWS), (8, 1)])
def test_training_looks_at_the_windows_that_an_answer_looks_at_and_runs_no_other(side: int, windows: int) -> None:
    image = Volume(np.random.default_rng(0).random((1, *[side] * 3), np.float32), np.eye(4), np.eye(4), (side,) * 3)
    inference = {"mode": "sliding", "roi": [8, 8, 8], "overlap": 0.5}
    calls: list[int] = []

    def both(window: Array) -> tuple[Array, Array]:
        calls.append(len(window))
        return window, window.reshape(len(window), -1)[:, :5]

    watch = FeatureRecorder(both)
    run_inference(watch, image, inference)
    of_answer = len(calls)
    np.testing.assert_array_equal(window_features(both, image, inference), watch.features)
    assert len(calls) - of_answer == windows <= of_answer


def test_a_subject_with_many_images_counts_once() -> None:
    scores = np.array([9.0] * 40 + list(np.linspace(0, 1, 40)))[:, None]
    people = ["many"] * 40 + [f"s-{i}" for i in range(40)]
    (limit,), method = conformal_thresholds(scores, people)
    assert method == "conformal"
    assert limit < 2  # one of 41 subjects is no twentieth


def test_numbers_that_never_differ_in_training_do_not_flag_a_rounding() -> None:
    same: list[OODFeatures] = [{part: np.ones(3) for part in FEATURE_GROUPS} for _ in range(40)]
    reference = fit_detector(same[:20], names(20), same[20:], names(20))
    assert reference.score(same[0]).ood is False
    assert reference.score({**same[0], "geometry": np.array([1.0, 1.0, 1.7])}).ood is True


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """30 subjects of one picture each."""
    folder = tmp_path_factory.mktemp("Mustermann_Erika")
    rng = np.random.default_rng(0)
    for number in range(30):
        np.save(folder / f"p{number:02d}.npy", rng.gamma(2, 50, (12, 12)).astype(np.float32))
    return build_index(folder, "xray")


def test_training_leaves_statistics_of_its_images_and_nothing_of_any_one(index: Index, tmp_path: Path) -> None:
    cohort = open_cohort(index, index.records, STEPS, split_seed=0, store=tmp_path / "store")
    written = []
    for name in ("one", "two"):
        network = Means().train()
        save_ood_detector(tmp_path / name, network, cohort, make_spec(SPEC))
        assert network.training
        written.append((tmp_path / name / OOD_FILE).read_bytes())
    assert written[0] == written[1]
    reference = OODDetector.parse(written[0])
    assert reference.counts["images"] == len(cohort.records("train"))
    assert reference.counts["held_out_subjects"] == len({r.subject for r in cohort.records("val")})
    arrays = safetensors.numpy.load(written[0])
    assert max(array.ndim and len(array) for array in arrays.values()) < len(cohort.records("train"))  # no row an image
    texts = [array.tobytes().decode() for array in arrays.values() if array.dtype == np.uint8]
    assert texts == [reference.method]


def test_too_few_subjects_give_no_statistics_and_an_old_file_goes(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = index.records[:8]
    cohort = open_cohort(index, records, STEPS, split_seed=0, store=tmp_path / "store")
    write_bytes(tmp_path / OOD_FILE, b"of another run")
    save_ood_detector(tmp_path, Means(), cohort, make_spec(SPEC))
    assert not (tmp_path / OOD_FILE).exists()
    assert "no out-of-distribution detector" in caplog.text


def test_a_network_that_takes_no_whole_image_ends_its_training_without_statistics(
    index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fixed(Means):
        def forward(self, image: torch.Tensor) -> Features:
            return Features((image,), nn.Linear(7, 2)(image.flatten(1)))

    cohort = open_cohort(index, index.records, STEPS, split_seed=0, store=tmp_path / "store")
    save_ood_detector(tmp_path, Fixed(), cohort, make_spec(SPEC))
    assert not (tmp_path / OOD_FILE).exists()
    assert "no out-of-distribution detector" in caplog.text


@pytest.mark.parametrize("change", ["mean", "limit", "method", "schema_version"])
def test_a_damaged_file_is_told(change: str) -> None:
    data = fit_detector(rows_like(40, 0), names(40), rows_like(20, 1), names(20)).dump()
    arrays = safetensors.numpy.load(data)
    wrong: dict[str, Any] = {"mean": np.full(6, np.nan), "limit": np.float32(-1), "schema_version": 9}
    wrong["method"] = np.frombuffer(b"guess", np.uint8)
    arrays[change if change in arrays else f"features.{change}"] = np.asarray(wrong[change])
    with pytest.raises(ValueError, match=r"wrong shape|method|schema version"):
        OODDetector.parse(safetensors.numpy.save(arrays))
