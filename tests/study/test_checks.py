from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medim.config import FinetuneConfig
from medim.data.contamination import TrainingHistory, load_training_history
from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import Cohort
from medim.evaluation.probing.label_budget import Budget
from medim.study.checks import (
    check_disjoint_splits,
    check_evaluation_split,
    check_networks,
    check_one_class_per_image,
    check_selection_budgets,
    count_contamination,
    count_selection_labels,
    draw_label_subsets,
)
from medim.study.design import Arm, read_arms
from medim.training.finetune.run import open_labelled_cohort
from medim.types import UsageError, UserError


@pytest.fixture(scope="module")
def cohort(index: Index, schedule: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return open_labelled_cohort(schedule, index, split_seed=0, store=tmp_path_factory.mktemp("store"))


def test_a_sound_cohort_passes(cohort: Cohort) -> None:
    check_disjoint_splits(cohort)
    check_evaluation_split("classification", cohort)


def test_findings_are_refused_for_what_they_are(index: Index) -> None:
    check_one_class_per_image(index)
    told = replace(index, records=tuple(replace(r, label="+up|-down") for r in index.records))
    assert told.findings
    with pytest.raises(UserError, match="labels of 2 findings"):
        check_one_class_per_image(told)


def test_a_subject_on_both_sides_is_refused(cohort: Cohort) -> None:
    trained, held = cohort.records("train")[0], cohort.records("val")[0]
    records = tuple(replace(r, subject=held.subject) if r == trained else r for r in cohort.index.records)
    with pytest.raises(UserError, match="1 subjects are in both the training and the validation split"):
        check_disjoint_splits(replace(cohort, index=replace(cohort.index, records=records)))


def test_the_same_pixels_on_both_sides_are_refused(pictures: Path, schedule: FinetuneConfig, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "copies")
    shutil.copy(tmp_path / "copies" / "picture00.png", tmp_path / "copies" / "picture01.png")
    rows = (pictures / "labels.csv").read_text().split()
    sides = ["split", *("val" if n % 4 == 0 else "train" for n in range(len(rows) - 1))]
    table = "\n".join(f"{row},{side}" for row, side in zip(rows, sides, strict=True))
    (tmp_path / "copies" / "labels.csv").write_text(table + "\n")
    index = build_index(tmp_path / "copies", "xray", labels=tmp_path / "copies" / "labels.csv")
    cohort = open_labelled_cohort(schedule, index, split_seed=0, store=tmp_path / "store")
    with pytest.raises(UserError, match=r"1 validation images \(of 1 subjects\) have the same pixels"):
        check_disjoint_splits(cohort)


def test_too_few_subjects_to_measure_on_are_refused(cohort: Cohort) -> None:
    keys = {r.image: cohort.keys[r.image] for r in (*cohort.records("train"), *cohort.records("val")[:4])}
    with pytest.raises(UserError, match="at least 5 subjects for an interval, got 4"):
        check_evaluation_split("classification", replace(cohort, keys=keys))


def test_a_class_that_is_missing_in_the_evaluation_split_is_refused(cohort: Cohort) -> None:
    lost = {r.image for r in cohort.records("val") if r.label == "up"}
    kept = {image: key for image, key in cohort.keys.items() if image not in lost}
    with pytest.raises(UserError, match="got 0 with up"):
        check_evaluation_split("classification", replace(cohort, keys=kept))


def test_an_encoder_that_saw_the_evaluation_split_is_counted_and_with_strict_refused(
    cohort: Cohort, encoders: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(encoders[0], tmp_path / "knows")
    TrainingHistory().extended("pretrain", cohort.cases(cohort.records("val")[:3])).write(
        tmp_path / "knows" / "encoder"
    )
    arms = read_arms([f"clean={encoders[0]}", f"knows={tmp_path / 'knows'}"])
    assert load_training_history(encoders[0]) is not None
    counts = count_contamination(arms, cohort, fail_on_contamination=False)
    none = {"images": 0, "subjects": 0}
    assert counts["clean"] == [{"pretrain": none, "finetune": none}]
    known = counts["knows"][0]
    assert known is not None
    assert known["pretrain"] == {"images": 3, "subjects": 3}
    with pytest.raises(UserError, match=r"encoder knows .* 3 images, 3 subjects.*--fail-on-contamination allows none"):
        count_contamination(arms, cohort, fail_on_contamination=True)


def test_labels_that_chose_an_encoders_step_are_counted_and_told(
    encoders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(encoders[0], tmp_path / "probed")
    file = tmp_path / "probed" / "encoder" / "encoder.json"
    spec = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            {**spec, "checkpoint_selection": {**spec["checkpoint_selection"], "criterion": "probe", "n_labels": 60}}
        )
    )
    assert count_selection_labels(read_arms([f"dim={encoders[1]}"])) == {
        "dim": spec["checkpoint_selection"]["n_labels"]
    }
    assert count_selection_labels(read_arms([f"both={encoders[0]},{tmp_path / 'probed'}"])) == {"both": 60}
    assert "both (60)" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"), [("encoder", {"name": "resnet"}), ("preprocessing", []), ("input_shape", [16, 16])]
)
def test_arms_with_different_networks_are_refused(encoders: list[Path], tmp_path: Path, key: str, value: Any) -> None:
    shutil.copytree(encoders[0], tmp_path / "other")
    file = tmp_path / "other" / "encoder" / "encoder.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    check_networks(read_arms([f"dim={encoders[0]},{encoders[1]}"]))
    with pytest.raises(UserError, match="has the same weights as"):
        check_networks(read_arms([f"dim={encoders[0]},{encoders[1]},{encoders[0]}"]))
    with pytest.raises(UserError, match=f"the same network.*differs; {key} is"):
        check_networks(read_arms([f"dim={encoders[0]}", f"other={tmp_path / 'other'}"]))


def test_budgets_are_nested_whole_and_in_order(cohort: Cohort) -> None:
    asked = [Budget(fraction=1.0), Budget(labelled=4), Budget(labelled=12)]
    ordered, subsets = draw_label_subsets("classification", cohort, asked, seeds=2)
    assert [b.name for b in ordered] == ["4", "12", "100%"]
    for seed in range(2):
        small, large = ({r.image for r in subsets[b, seed]} for b in ordered[:2])
        assert (len(small), len(large)) == (4, 12)
        assert small < large
    assert (ordered[2], 1) not in subsets
    assert {r.image for r in subsets[ordered[0], 0]} != {r.image for r in subsets[ordered[0], 1]}


def test_budgets_that_give_the_same_labels_or_lack_a_class_are_refused(cohort: Cohort) -> None:
    with pytest.raises(UsageError, match="both give 48 labelled images"):
        draw_label_subsets("classification", cohort, [Budget(labelled=1000), Budget(fraction=1.0)], seeds=1)
    with pytest.raises(UserError, match="a label of every class"):
        draw_label_subsets("classification", cohort, [Budget(labelled=1)], seeds=1)


def test_a_grid_of_rates_that_a_budget_cannot_pay_for_is_refused() -> None:
    check_selection_budgets({})
    with pytest.raises(UsageError, match=r"budget 4 is too small for selection: it has 4 .* fixed"):
        check_selection_budgets({"4": "it has 4 labelled images, but 10 are needed"})


def test_a_refused_study_leaves_no_result(
    run_study: Callable[..., dict[str, Any]], arms: tuple[Arm, ...], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--lr-multipliers"):
        run_study(lr_multipliers=(0.3, 1.0))
    assert not (tmp_path / "study").exists()


def test_an_unavailable_device_is_rejected_before_images_are_read_or_files_are_written(
    run_study: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.data.loading.cohort.fill_store", lambda *_, **__: pytest.fail("an image was read"))
    with pytest.raises(UserError, match="--device tpu: not available on this machine"):
        run_study(accelerator="tpu")
    assert not list(tmp_path.iterdir())
