import pytest

from medim.data.index.subject_names import infer_subjects

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
