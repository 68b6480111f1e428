from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from medim.data.contamination import (
    CaseIdentity,
    TrainingHistory,
    TrainingSet,
    check_contamination,
    describe_counts,
    load_training_history,
)
from medim.privacy import make_pseudonym
from medim.types import UserError

CASES: list[CaseIdentity] = [
    ("a" * 32, make_pseudonym("one")),
    ("b" * 32, make_pseudonym("one")),
    ("", make_pseudonym("two")),
]
STRANGER: CaseIdentity = ("c" * 32, make_pseudonym("three"))


@pytest.fixture
def seen() -> TrainingHistory:
    return TrainingHistory().extended("pretrain", CASES)


def test_what_was_seen_comes_back_from_the_file_wherever_the_weights_lie(tmp_path: Path, seen: TrainingHistory) -> None:
    assert load_training_history(tmp_path) is None
    after = seen.extended("finetune", [STRANGER])
    for folder in (tmp_path / "run" / "encoder", tmp_path / "tuned" / "model", tmp_path / "package"):
        after.write(folder)
    run, tuned, package = (load_training_history(tmp_path / name) for name in ("run", "tuned", "package"))
    assert run == tuned == package == load_training_history(tmp_path / "run" / "encoder") == after
    assert after.count_cases([*CASES, STRANGER]) == {
        "pretrain": {"images": 2, "subjects": 2},
        "finetune": {"images": 1, "subjects": 1},
    }


def test_an_image_is_known_under_another_subject_and_a_subject_by_another_image(seen: TrainingHistory) -> None:
    assert seen.contains("pretrain", (CASES[0][0], "another"))
    assert seen.contains("pretrain", ("d" * 32, CASES[0][1]))
    assert not seen.contains("pretrain", STRANGER)
    assert not seen.contains("pretrain", ("", STRANGER[1])), "an image of one value is like no other"
    assert not seen.contains("finetune", CASES[0])


def test_the_file_holds_nothing_that_stands_for_an_image_or_a_person_anywhere_else(tmp_path: Path) -> None:
    texts = []
    for name in "ab":
        TrainingHistory().extended("pretrain", CASES).write(tmp_path / name)
        texts.append((tmp_path / name / "fingerprints.json").read_text())
    for secret in [*(part for case in CASES for part in case if part), make_pseudonym("site")]:
        assert secret not in texts[0]
        assert secret.removeprefix("s-") not in texts[0]
    first, second = ({*origin["images"], *origin["subjects"]} for t in texts for origin in json.loads(t)["origins"])
    assert len(first) == len(second) == 4
    assert not first & second, "two files cannot be compared"


def test_another_site_knows_the_images_and_not_the_subjects(
    seen: TrainingHistory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MEDIM_SITE_KEY", "another site")
    assert check_contamination(seen, [CASES[0], STRANGER], weights_name="encoder e") == {
        "pretrain": {"images": 1, "subjects": None},
        "finetune": {"images": 0, "subjects": 0},
    }
    leak = "WARNING leakage: 1 of 2 evaluation images (50%) was used in pretraining (recognised by pixels; subject IDs "
    assert leak + "unknown). Results are too good. --fail-on-contamination refuses them" in caplog.text
    assert check_contamination(seen, [STRANGER], weights_name="encoder e", fail_on_contamination=True)


def test_strict_refuses_what_was_seen_and_what_cannot_be_known(
    seen: TrainingHistory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert check_contamination(seen, [STRANGER], weights_name="encoder e", fail_on_contamination=True)
    assert caplog.records[-1].levelno == logging.INFO
    for weights, cases, reason in (
        (seen, CASES[:1], r"seen in pretraining 1 image, 1 subject; .* trained without them"),
        (None, [STRANGER], r"seen unknown: the weights have no fingerprints\.json"),
        (
            TrainingHistory(seen.training_sets, ("finetune",)),
            [STRANGER],
            r"seen in fine-tuning unknown: the initial weights had no",
        ),
    ):
        with pytest.raises(UserError, match=reason):
            check_contamination(weights, cases, weights_name="encoder e", fail_on_contamination=True)
        check_contamination(weights, cases, weights_name="encoder e")
        assert caplog.records[-1].levelno == logging.WARNING
    lines = len(caplog.records)
    assert check_contamination(TrainingHistory(), CASES, weights_name="fresh weights", fail_on_contamination=True)
    assert len(caplog.records) == lines, "fresh weights have nothing to say"


def test_images_recognised_under_other_subject_ids_are_a_leakage_without_subjects(
    seen: TrainingHistory, caplog: pytest.LogCaptureFixture
) -> None:
    cases = [(CASES[0][0], "s-renamed"), (STRANGER[0], "s-other"), (STRANGER[0], CASES[0][1])]
    counts = check_contamination(seen, cases[:2], weights_name="encoder e")
    assert (
        "1 of 2 evaluation images (50%) was used in pretraining (recognised by pixels; subject IDs differ)"
        in caplog.text
    )
    assert describe_counts(counts)["seen in pretraining"] == "1 image (subject IDs differ)"
    caplog.clear()
    check_contamination(seen, cases[2:], weights_name="encoder e", excluded_kinds=["pretrain"])
    leak = "WARNING leakage: other images of 1 of 1 evaluation subject were used in pretraining. They are left out"
    assert leak in caplog.text


def test_what_was_seen_is_told_in_words() -> None:
    counts = {"pretrain": {"images": 1, "subjects": 2}, "finetune": {"images": None, "subjects": None}}
    told = describe_counts(counts)  # type: ignore[arg-type]
    assert told["seen in pretraining"] == "1 image, 2 subjects"
    assert told["seen in fine-tuning"].startswith("unknown")


ORIGIN = {"kind": "pretrain", "salt": "ab", "site": "s", "images": [], "subjects": []}


@pytest.mark.parametrize(
    "content",
    [
        {"schema_version": 2, "origins": [], "unknown": []},
        {"schema_version": 1, "origins": [{"kind": "pretrain"}], "unknown": []},
        {"schema_version": 1, "origins": [], "unknown": ["other"]},
        {"schema_version": 1, "origins": [{**ORIGIN, "subjects": [None]}], "unknown": []},
        {"schema_version": 1, "origins": [{**ORIGIN, "images": "abc"}], "unknown": []},
        {"schema_version": 1},
    ],
)
def test_a_file_of_another_kind_is_told(tmp_path: Path, content: dict[str, object]) -> None:
    (tmp_path / "fingerprints.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected fingerprints of schema version 1"):
        load_training_history(tmp_path)


def test_an_origin_of_no_image_is_possible() -> None:
    assert TrainingSet.from_cases("pretrain", []).images == frozenset()
