"""Pseudonyms, the site key, and paths without patients."""

from __future__ import annotations

import stat
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import pytest

from medim.privacy import Scrubber, identity_tokens, load_site_key, make_pseudonym, resolve_scrubbed_path, scrubbed_name
from medim.types import UserError

HIDDEN = ["Doe_John", "doe-john", "DOE.JOHN", "MR_Doe_John_1", "JohnDoe.dcm", "Doe^John", "john.doe.nii.gz"]
HIDDEN += ["20200119", "MR-2020-01-19"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MEDIM_SITE_KEY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "medim" / "site.key"


def test_a_pseudonym_is_hmac_sha256_under_the_site_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIM_SITE_KEY", "Jefe")  # test case 2 of RFC 4231
    assert make_pseudonym("what do ya want for nothing?") == "s-5bdcc146bf60"
    assert make_pseudonym("what do ya want for nothing?", prefix="p") == "p-5bdcc146bf60"


def test_two_sites_give_one_person_two_pseudonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIM_SITE_KEY", "one")
    first = make_pseudonym("ID-4711")
    assert make_pseudonym("ID-4711") == first
    monkeypatch.setenv("MEDIM_SITE_KEY", "two")
    assert make_pseudonym("ID-4711") != first


def test_the_key_file_is_made_once_and_for_its_owner_alone(config: Path) -> None:
    key = load_site_key()
    assert config.read_bytes() == key
    assert len(key) == 64
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert load_site_key() == key
    assert [path.name for path in config.parent.iterdir()] == ["site.key"]


def test_two_processes_that_make_the_key_at_once_end_with_one(config: Path) -> None:
    from medim.privacy import _load_key_file

    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: _load_key_file.__wrapped__(str(config)), range(32)))
    assert keys == {config.read_bytes()}


def test_a_key_that_others_could_read_is_closed(config: Path) -> None:
    config.parent.mkdir(parents=True)
    config.write_text("a key of this site")
    config.chmod(0o644)
    assert load_site_key() == b"a key of this site"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def test_a_folder_that_cannot_hold_the_key_is_an_error_with_a_remedy(config: Path) -> None:
    config.parent.parent.mkdir()
    config.parent.write_text("a file in the way")
    with pytest.raises(UserError, match="Set MEDIM_SITE_KEY"):
        load_site_key()


@pytest.mark.parametrize("part", HIDDEN)
def test_a_part_that_equals_an_identity_is_hidden(part: str) -> None:
    scrub = Scrubber(identity_tokens(["Doe^John", "DoeJohn", "JohnDoe", "20200119", ""]))
    assert scrub.contains_identity(part)
    assert scrub.scrub_part(part) == scrubbed_name(part)
    assert "doe" not in scrub.scrub_part(part).lower()


def test_a_part_that_does_not_stays_readable() -> None:
    scrub = Scrubber(identity_tokens(["Doe^John", "2", "1.2.840.5"]))
    assert scrub.scrub_path(PurePath("Study1/T2_axial/12.dcm")) == "Study1/T2_axial/12.dcm"
    assert scrub.scrub_path(PurePath("a/test_2.dcm")) == "a/test_2.dcm"  # "2" is part of a name here
    assert scrub.scrub_part("2.dcm").endswith(".dcm") != scrub.scrub_part("2.dcm").startswith("2")
    assert scrub.contains_identity("1.2.840.5")
    assert scrub.contains_identity("1.2.840.5.dcm")
    assert not Scrubber(identity_tokens([])).contains_identity("anything")


def test_letters_of_every_script_count() -> None:
    assert Scrubber(identity_tokens(["Müller^Jürgen"])).contains_identity("müller_jürgen")
    assert Scrubber(identity_tokens(["山田^太郎"])).contains_identity("山田_太郎.dcm") or Scrubber(
        identity_tokens(["山田^太郎"])
    ).contains_identity("山田太郎")


@pytest.mark.parametrize(
    "written", ["Mueller_Juergen", "Muller_Jurgen", "MÜLLER JÜRGEN", unicodedata.normalize("NFD", "Müller_Jürgen")]
)
def test_a_name_is_found_however_its_letters_are_written(written: str) -> None:
    assert Scrubber(identity_tokens(["Müller^Jürgen"])).contains_identity(written)


def test_a_hidden_path_is_found_again(tmp_path: Path) -> None:
    scrub = Scrubber(identity_tokens(["Doe^John", "20200119"]))
    file = tmp_path / "Doe_John" / "2020-01-19" / "T1" / "MR_Doe_John_1.dcm"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "Roe_Jane").mkdir()
    written = scrub.scrub_path(file.relative_to(tmp_path))
    assert "/T1/" in written
    assert "Doe" not in written
    assert "2020" not in written
    assert resolve_scrubbed_path(tmp_path, written) == file
    file.unlink()
    with pytest.raises(UserError, match="medim index"):
        resolve_scrubbed_path(tmp_path, written)


DATES = ["17-02-1943", "17.02.1943", "17021943", "02-17-1943", "430217", "17_2_1943", "17-Feb-1943", "Feb 17 1943"]
NUMBERS = ["4711", "00004711", "pat4711extra", "MR_4711", "x0004711.dcm"]


@pytest.mark.parametrize("part", [*DATES, *NUMBERS])
def test_a_date_in_another_order_and_an_id_with_other_zeros_are_hidden(part: str) -> None:
    assert Scrubber(identity_tokens(["19430217", "0004711"])).contains_identity(part)


@pytest.mark.parametrize("part", ["Wu_MRI_2020", "Li-chest", "NG.nii.gz", "t1 An 2", "WU"])
def test_a_short_name_is_hidden_where_it_is_a_word(part: str) -> None:
    assert Scrubber(identity_tokens([], ["Wu^An", "Ng Li"])).contains_identity(part)


@pytest.mark.parametrize("part", ["wunder", "MR_1", "scan", "flair", "2020", "1702", "4712", "IM_000012", "17-02-1944"])
def test_other_words_dates_and_numbers_stay_readable(part: str) -> None:
    assert not Scrubber(identity_tokens(["19430217", "0004711", "12"], ["Wu^An", "Ng Li"])).contains_identity(part)


def test_a_value_that_is_no_date_has_no_other_spelling() -> None:
    assert not Scrubber(identity_tokens(["19431317"])).contains_identity("17-13-1943")
