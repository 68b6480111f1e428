"""Names of files and folders that identify nobody, and those that may."""

from __future__ import annotations

import pytest

from medim.neutral_names import is_neutral_name, list_identifying_words

NEUTRAL = [
    "sub-01_ses-2_T1w.nii.gz", "hippocampus_017.nii.gz", "imagesTr", "EX-003_1", "IM_000012.dcm", "T2FLAIR", "a", "..",
    "BraTS20_Training_001_flair", "Study1", "1-001.dcm", "AX T2 FSE FS", "2D", "xray-28", "sub01", "run-1_v2.0",
    "pneumoniamnist.npz", "1-2-3",
]  # fmt: skip
IDENTIFYING = [
    "Doe_John", "doe", "JohnDoe", "scan_Doe", "J.Smith", "JD", "4711.png", "0004711", "pat4711", "QX7731904.nii",
    "A12B345", "MR_17-02-1943", "20200119", "17.2.43", "2020-01-19", "sub-doe01", "Müller", "山田", "1.2.840.113619.2",
    "Kestrelheim",
]  # fmt: skip


@pytest.mark.parametrize("name", NEUTRAL)
def test_words_of_imaging_and_short_numbers_are_neutral(name: str) -> None:
    assert is_neutral_name(name)


@pytest.mark.parametrize("name", IDENTIFYING)
def test_every_other_word_long_number_and_date_is_not(name: str) -> None:
    assert not is_neutral_name(name)


def test_the_words_of_a_text_that_may_identify_somebody_are_listed() -> None:
    assert list_identifying_words("Zyxwvuta NIfTI 17 scan-4711") == ["Zyxwvuta", "4711"]
