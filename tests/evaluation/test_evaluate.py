from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from medim.data.contamination import CaseIdentity, TrainingHistory, TrainingKind
from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import AllRejectedError, Index
from medim.data.loading.splits import assign_splits as split_subjects
from medim.data.loading.splits import write_splits
from medim.evaluation.cases import read_cases, score_cases
from medim.evaluation.evaluate import EvaluateOptions, build_predictor, evaluate, select_records, validate_network
from medim.tasks.classification import class_arrays
from medim.types import Array, UserError
from tests.evaluation.conftest import make_run
from tests.specs import make_spec


def perfect(image: Array) -> Array:
    """(N, 1, ...) whose voxels are 100 times the label -> (N, 3, ...) logits."""
    return np.stack([-np.abs(image[:, 0] - 100 * k) for k in range(3)], axis=1)


def swapped(image: Array) -> Array:
    return perfect(image)[:, [0, 2, 1]]


def by_size(image: Array) -> Array:
    """Logits (N, 2) of big and small by the number of bright voxels."""
    bright = (image > 50).reshape(len(image), -1).sum(axis=1) - 130.0  # small boxes: 112 voxels; others 140 and 168
    return np.stack([bright, -bright], axis=1) / 20


def test_a_perfect_network_scores_one_in_the_image_s_own_space(index: Index, segmenter: dict[str, Any]) -> None:
    found = validate_network(perfect, index, index.records, make_spec(segmenter))[0]
    assert (found["n"], found["subjects"], found["rejected"]) == (8, 4, 0)
    assert found["metrics"]["dice"] == {"value": 1, "ci_low": 1, "ci_high": 1, "n": 8}
    for name in ("front", "back"):
        assert found["metrics"][f"hd95_{name}"]["value"] == 0
        assert found["metrics"][f"surface_dice_{name}"]["value"] == 1


def test_classes_that_are_swapped_score_zero_and_have_their_distance_in_mm(
    index: Index, segmenter: dict[str, Any]
) -> None:
    found = validate_network(swapped, index, index.records, make_spec(segmenter))[0]["metrics"]
    assert found["dice"]["value"] == 0
    assert found["hd95_front"]["value"] == pytest.approx(10)  # the far side of `back`: 5 voxels of 2 mm


def test_rows_hold_the_volumes_in_millilitres(index: Index, segmenter: dict[str, Any]) -> None:
    row = score_cases(build_predictor(perfect, make_spec(segmenter)), index, index.records)[0]
    assert (row["class"], row["dice"]) == ("front", 1)
    assert row["truth_ml"] == row["predicted_ml"] == pytest.approx(3 * 4 * 4 * 2 * 1 * 0.5 / 1000)


def test_masks_of_a_source_that_names_the_classes_in_another_order_are_relabelled(
    index: Index, segmenter: dict[str, Any]
) -> None:
    other = {**segmenter, "classes": ["back", "front"]}
    assert validate_network(swapped, index, index.records, make_spec(other))[0]["metrics"]["dice"]["value"] == 1


def test_a_source_of_other_classes_is_refused(index: Index, segmenter: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected the model's classes \(left, right\), got front, back"):
        validate_network(perfect, index, index.records, make_spec({**segmenter, "classes": ["left", "right"]}))


def test_classification_is_by_the_probability_of_each_class(index: Index, classifier: dict[str, Any]) -> None:
    found = validate_network(by_size, index, index.records, make_spec(classifier))[0]
    assert {name: metric["value"] for name, metric in found["metrics"].items() if name != "ece"} == {
        "auroc": 1,
        "average_precision": 1,
        "accuracy": 1,
        "balanced_accuracy": 1,
        "f1": 1,
    }
    rows = score_cases(build_predictor(by_size, make_spec(classifier)), index, index.records)
    probabilities, labels = class_arrays(rows, classifier["classes"])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    assert [classifier["classes"][k] for k in labels] == [record.label for record in index.records]


def test_a_case_that_cannot_be_read_becomes_a_rejected_row_and_is_counted(
    masks: Path, index: Index, segmenter: dict[str, Any]
) -> None:
    (masks / "imagesTr" / "case3.nii.gz").write_bytes(b"not an image")
    steps: list[tuple[int, int]] = []
    rows = score_cases(
        build_predictor(perfect, make_spec(segmenter)), index, index.records, progress=lambda *step: steps.append(step)
    )
    refused = [row for row in rows if row.get("rejected")]
    assert [row["image"] for row in refused] == [index.records[3].image]
    assert refused[0]["rejected"]
    assert str(masks) not in refused[0]["detail"]
    assert steps == [(i, 8) for i in range(1, 9)]
    found = validate_network(perfect, index, index.records, make_spec(segmenter))[0]
    assert (found["n"], found["rejected"], found["metrics"]["dice"]["n"]) == (7, 1, 7)


def test_an_image_of_another_kind_than_the_network_takes_is_a_rejected_row(
    index: Index, classifier: dict[str, Any]
) -> None:
    records = [index.records[0], dataclasses.replace(index.records[1], label="huge")]
    rows = score_cases(build_predictor(by_size, make_spec(classifier)), index, records)
    assert [row.get("rejected") for row in rows] == [None, None, "unknown-class"]
    with pytest.raises(AllRejectedError, match="expected a 2D image"):
        validate_network(
            by_size, index, index.records, make_spec({**classifier, "spatial_dims": 2, "input_shape": [8, 8]})
        )


def test_a_fault_of_the_network_is_no_rejection(index: Index, segmenter: dict[str, Any]) -> None:
    def broken(image: Array) -> Array:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        validate_network(broken, index, index.records, make_spec(segmenter))


def test_another_source_is_evaluated_whole_and_the_run_s_own_on_its_validation_split(
    index: Index, segmenter: dict[str, Any], tmp_path: Path
) -> None:
    assert select_records(index, make_spec(segmenter))[1] == "all"
    own = {**segmenter, "provenance": {"index_hash": index.hash}}
    chosen, part = select_records(index, make_spec(own))
    splits = split_subjects(index)
    assert part == "val"
    assert [r.image for r in chosen] == [i for i, s in splits.items() if s == "val"]
    assert len(select_records(index, make_spec(own), split="train")[0]) == 6
    stored = tmp_path / "split.csv"
    write_splits(stored, index, {r.image: "val" if i < 3 else "train" for i, r in enumerate(index.records)}, [], seed=0)
    assert select_records(index, make_spec(own), split_file=stored)[0] == index.records[:3]
    assert select_records(index, make_spec(segmenter), split_file=stored)[1] == "all"


def test_a_source_s_own_test_split_comes_first(index: Index, segmenter: dict[str, Any]) -> None:
    records = tuple(dataclasses.replace(r, split="test" if i < 2 else "train") for i, r in enumerate(index.records))
    marked = dataclasses.replace(index, records=records)
    chosen, part = select_records(marked, make_spec({**segmenter, "provenance": {"index_hash": marked.hash}}))
    assert (part, len(chosen)) == ("test", 2)


def case_of(index: Index, place: int) -> CaseIdentity:
    record = index.records[place]
    return compute_fingerprint(index.open(record)), record.subject


def test_what_the_model_was_trained_on_is_left_out_and_counted_by_subject_and_by_image(
    index: Index, segmenter: dict[str, Any], tmp_path: Path
) -> None:
    """The masks' images 0, 3 and 6 have the same pixels (of P0, P1, P3), and so have 1, 4, 7 and 2, 5."""
    seen = (
        TrainingHistory()
        .extended("pretrain", [case_of(index, 2)])
        .extended("finetune", [(case_of(index, 0)[0], "another")])
    )
    run = make_run(tmp_path / "run", segmenter, seen)
    found = evaluate(run, index, tmp_path / "out")
    assert found["contamination"] == {
        "pretrain": {"images": 2, "subjects": 1},
        "finetune": {"images": 3, "subjects": 0},
    }
    assert (found["n"], found["n_excluded_subjects"], found["n_excluded_images"]) == (5, 3, 3)
    kept = evaluate(run, index, tmp_path / "kept", EvaluateOptions(include_training_subjects=True))
    assert (kept["n"], kept["n_excluded_subjects"], kept["contamination"]) == (8, 0, found["contamination"])
    person = TrainingHistory().extended("finetune", [("0" * 32, index.records[0].subject)])
    found = evaluate(make_run(tmp_path / "person", segmenter, person), index, tmp_path / "by-subject")
    assert (found["n"], found["n_excluded_subjects"], found["n_excluded_images"]) == (6, 1, 2)
    everyone = TrainingHistory().extended("finetune", [("", record.subject) for record in index.records])
    with pytest.raises(UserError, match=r"trained on all 8.*--include-training-subjects"):
        evaluate(make_run(tmp_path / "everyone", segmenter, everyone), index, tmp_path / "none")


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_strict_refuses_before_any_figure_is_written_and_passes_where_nothing_was_seen(
    kind: TrainingKind, index: Index, segmenter: dict[str, Any], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", segmenter, TrainingHistory().extended(kind, [case_of(index, 2)]))
    with pytest.raises(UserError, match=r"2 images, 1 subject.* --fail-on-contamination allows none"):
        evaluate(run, index, tmp_path / "out", EvaluateOptions(fail_on_contamination=True))
    assert not (tmp_path / "out").exists()
    other = make_run(tmp_path / "other", segmenter, TrainingHistory().extended(kind, [("0" * 32, "another")]))
    assert evaluate(other, index, tmp_path / "out", EvaluateOptions(fail_on_contamination=True))["n"] == 8


def test_a_model_without_a_record_says_that_it_does_not_know(
    index: Index, segmenter: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path / "run", segmenter)
    found = evaluate(run, index, tmp_path / "out")
    assert (found["contamination"], found["n_excluded_subjects"], found["n_excluded_images"], found["n"]) == (
        None,
        None,
        None,
        8,
    )
    assert "seen unknown: the weights have no fingerprints.json" in caplog.text
    with pytest.raises(UserError, match=r"unknown.*--fail-on-contamination"):
        evaluate(run, index, tmp_path / "strict", EvaluateOptions(fail_on_contamination=True))


def test_a_model_of_another_site_is_known_by_its_images_alone(
    index: Index, segmenter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of(index, 2)
    monkeypatch.setenv("MEDIM_SITE_KEY", "elsewhere")
    seen = TrainingHistory().extended("finetune", [case, ("0" * 32, index.records[7].subject)])
    monkeypatch.delenv("MEDIM_SITE_KEY")
    found = evaluate(make_run(tmp_path / "run", segmenter, seen), index, tmp_path / "out")
    assert found["contamination"]["finetune"] == {"images": 2, "subjects": None}
    assert (found["n"], found["n_excluded_images"]) == (6, 2)


def test_images_without_a_mask_are_refused_with_what_to_do(index: Index, segmenter: dict[str, Any]) -> None:
    bare = dataclasses.replace(index, records=tuple(dataclasses.replace(r, mask=None) for r in index.records))
    with pytest.raises(UserError, match=r"none of 8 images has a mask\. Use a Decathlon folder.*columns image,mask"):
        select_records(bare, make_spec(segmenter))


def test_evaluating_a_run_writes_metrics_cases_and_last_the_summary(
    tmp_path: Path, index: Index, segmenter: dict[str, Any]
) -> None:
    seen = TrainingHistory().extended("finetune", [("0" * 32, index.records[0].subject)])
    run = make_run(tmp_path / "run", segmenter, seen)
    summary = evaluate(run, index, tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {key: summary[key] for key in metrics} == metrics
    assert (metrics["n"], metrics["subjects"], metrics["n_excluded_subjects"], metrics["split"]) == (6, 3, 1, "all")
    assert (metrics["n_excluded_images"], metrics["init"], summary["runtime"]) == (2, "scratch", "torch")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    rows = read_cases(tmp_path / "out" / "cases.parquet")
    assert [row["class"] for row in rows] == ["front", "back"] * 6
    assert metrics["metrics"]["dice"]["value"] == pytest.approx(np.mean([row["dice"] for row in rows]))
    assert pq.read_schema(tmp_path / "out" / "cases.parquet").metadata[b"schema_version"] == b"1"
    texts = [path.read_text() for path in (tmp_path / "out").glob("*.json")] + [str(rows)]
    assert len(texts) == 4
    texts = [re.sub(r"base64,[\w+/=]+", "", text) for text in texts]
    assert not any(subject in text for text in texts for subject in ("P0", "P3"))


def test_one_seed_gives_the_same_bytes_and_a_filled_folder_is_refused(
    tmp_path: Path, index: Index, classifier: dict[str, Any]
) -> None:
    run = make_run(tmp_path / "run", classifier)
    for out in ("one", "two"):
        evaluate(run, index, tmp_path / out)
    for name in ("metrics.json", "cases.parquet", "pictures.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["n_excluded_subjects"] is None
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(run, index, tmp_path / "one")
