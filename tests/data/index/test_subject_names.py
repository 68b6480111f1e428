import pytest

from medim.data.index.subject_names import infer_subjects, infer_subjects_from_stems

CASES = {
    "each file": {"a": "a", "x/b": "b", "y/c": "c"},
    "files of one name": {f"{s}/p{k}": f"p{k}" for s in ("T1", "T2") for k in range(4)},
    "the folder": {f"p{k}/{s}": f"p{k}" for s in ("t1", "t2", "flair") for k in range(3)},
    "the folder of one file": {f"p{k}/image": f"p{k}" for k in range(3)},
    "the folder of visits": {f"p{k}/v{v}/{s}": f"p{k}" for s in ("t1", "t2") for v in (1, 2) for k in range(3)},
    "the folder, not the site": {f"site{k % 2}/p{k}/t1": f"p{k}" for k in range(6)},
    "the folder in each name": {f"BraTS_{k}/BraTS_{k}_{s}": f"BraTS_{k}" for s in ("t1", "t2") for k in range(3)},
    "the rest of each name": {f"{s}/{s}_p{k}": f"p{k}" for s in ("T1", "T2") for k in range(4)},
    "the folder, where some names are odd": {
        **{f"p{k}/{s}": f"p{k}" for s in ("t1", "t2", "flair") for k in range(3)},
        "p0/extra": "p0",
    },
    "each file, where a few repeat by chance": {
        **{f"{f}/{f}{k}": f"{f}{k}" for f in "ab" for k in range(9)},
        "a/scan": "scan",
        "b/scan": "scan",
    },
    "a file beside folders": {"t1": "t1", "p/t1": "p", "q/t1": "q"},
}


@pytest.mark.parametrize("subjects", CASES.values(), ids=CASES)
def test_the_level_of_the_path_that_is_the_subjects_is_found(subjects: dict[str, str]) -> None:
    found = infer_subjects(tuple(path.split("/")) for path in subjects)
    assert {"/".join(path): subject for path, subject in found.items()} == subjects


STEMS = {
    "a patient and a follow-up": {f"{p:08}_{k:03}": f"{p:08}" for p in range(5) for k in range(p + 1)},
    "a person in several classes": {
        f"person{p}_{c}_{9 * p + k}": f"person{p}" for p in range(4) for k, c in enumerate("ab")
    },
    "a series of a patient": {f"IM-{p:04}-{k:04}-0001": f"IM-{p:04}" for p in (3, 5, 7) for k in (1, 2)},
    "a patient after words": {f"chest_{p}_{v}": f"chest_{p}" for p in range(9) for v in ("pa", "lateral")},
    "a code": {f"IXI{p:03}-Guys-08{p}-{s}": f"IXI{p:03}" for p in range(3) for s in ("T1", "T2")},
    "numbers alone": {f"image_{k:03}" for k in range(20)},
    "a site": {f"site{s}_{k}" for s in range(3) for k in range(4)},
    "a hospital's number": {f"hospital_{s}_{k}" for s in range(3) for k in range(4)},
    "words": {f"{c}_{k}" for c in ("normal", "sick") for k in range(4)},
    "large groups": {f"b{s}_{k}" for s in range(2) for k in range(50)},
    "one group of a few": {"p1_a", "p1_b", *(f"x{k}" for k in range(8))},
    "no separators": {f"JPCLN{k:03}" for k in range(9)},
}


@pytest.mark.parametrize("stems", STEMS.values(), ids=STEMS)
def test_names_that_begin_with_the_same_number_are_of_one_subject(stems: dict[str, str] | set[str]) -> None:
    assert infer_subjects_from_stems(list(stems)) == (stems if isinstance(stems, dict) else {})
