"""A study finds what was planted, and nothing where there is nothing: the benchmarks' own code, as it is or smaller."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.mark.slow
def test_a_planted_benefit_is_found_and_shuffled_voxels_teach_nothing(
    benchmark: Callable[[str], Any], tmp_path: Path
) -> None:
    comparisons = {row.arm: row for row in benchmark("planted_truth").run_planted_study(tmp_path)}
    assert comparisons["pretrained"].verdict == "benefit"
    assert comparisons["pretrained"].difference.low > 0
    assert comparisons["shuffled"].verdict != "benefit"


@pytest.mark.slow
def test_a_null_study_raises_no_alarm(benchmark: Callable[[str], Any], tmp_path: Path) -> None:
    study = benchmark("null_studies").run_null_study(0, tmp_path)
    assert not study["alarm"]
    assert all(0 < row["p"] <= 1 for row in study["comparisons"])


def test_shuffling_keeps_the_voxels_and_blanking_hides_half_of_them_at_the_mean(
    benchmark: Callable[[str], Any],
) -> None:
    planted = benchmark("planted_truth")
    voxels = np.random.default_rng(0).integers(1, 1000, (24, 28, 24)).astype(np.int16)
    mixed, nothing = planted.shuffle_voxels(voxels, 1)
    np.testing.assert_array_equal(np.sort(mixed.ravel()), np.sort(voxels.ravel()))
    assert abs(np.corrcoef(mixed.ravel(), voxels.ravel())[0, 1]) < 0.03
    assert not nothing.any()
    image, bright = planted.blank_blocks(voxels, 1)
    changed = image != voxels
    assert changed.mean() == pytest.approx(planted.HIDDEN, abs=0.1)
    assert set(np.unique(image[changed])) == {np.float32(voxels.mean())}
    np.testing.assert_array_equal(bright, voxels > voxels.mean())


def test_the_pictures_of_a_null_study_are_its_own_and_both_classes_are_alike_in_number(
    benchmark: Callable[[str], Any], tmp_path: Path
) -> None:
    null = benchmark("null_studies")
    first, again, other = (
        dict(np.load(null.write_noise_images(tmp_path / f"{n}.npz", seed))) for n, seed in enumerate((0, 0, 1))
    )
    np.testing.assert_array_equal(first["train_images"], again["train_images"])
    assert (first["train_images"] != other["train_images"]).any()
    assert np.bincount(first["val_labels"].ravel()).tolist() == [null.VAL // 2] * 2


def test_the_lesions_of_the_planted_cohort_have_10_mm_and_are_not_separated_by_brightness(
    benchmark: Callable[[str], Any],
) -> None:
    lesions = benchmark("lesion_crops")
    image, mask = lesions.simulate_lesions(0)
    np.testing.assert_array_equal(image, lesions.simulate_lesions(0)[0])
    pieces, count = ndimage.label(mask)
    assert 1 <= count <= 3
    for box in ndimage.find_objects(pieces):
        assert all(4 <= side.stop - side.start <= 10 for side in box)  # 5 voxels of 2 mm; two lesions may touch
    assert 0.0005 < mask.mean() < 0.002
    brightest = image > np.median(image[mask == 1])
    assert (brightest & (mask == 0)).sum() > 0.2 * mask.sum()  # of half of the lesions' voxels
    assert image[mask == 1].mean() > image.mean() + image.std()


@pytest.mark.slow
def test_the_arms_of_the_lesion_study_differ_in_their_crops_only_and_finished_runs_are_not_repeated(
    benchmark: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesions = benchmark("lesion_crops")
    arms = [lesions.build_lesion_config(share).model_dump() for share in lesions.SHARES.values()]
    assert [arm["views"].pop("foreground_share") for arm in arms] == [0.0, 0.33]
    assert arms[0] == arms[1]
    options: dict[str, Any] = {"seeds": (0,), "subsets": (0,), "steps": 2, "subjects": 25}
    content = lesions.run_lesion_study(tmp_path, **options)
    assert [row["arm"] for row in content["arms"]] == ["uniform", "foreground"]
    assert content["comparison"]["low"] <= content["comparison"]["difference"] <= content["comparison"]["high"]
    monkeypatch.setattr(lesions, "finetune", lambda *_, **__: pytest.fail("a finished run was repeated"))
    assert lesions.run_lesion_study(tmp_path, **options) == content
