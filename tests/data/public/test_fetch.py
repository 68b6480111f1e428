from __future__ import annotations

import fcntl
import hashlib
import io
import json
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from medim.cli import app
from medim.data.index.index import build_index
from medim.data.public.catalog import PUBLIC_SETS, PublicFile, PublicSet
from medim.data.public.fetch import FetchResult, fetch_public_set, locate_public_folder
from medim.data.public.tcia import API_URL
from medim.data.source import open_source
from medim.types import UsageError, UserError
from tests.data.public.test_archives import tar
from tests.data.public_server import Publisher, path_of, serving

SERIES = ("1.2.30", "1.2.31", "1.2.32")


def archive_of_pictures(labels: int = 1) -> bytes:
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 6), ("val", 4), ("test", 2)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 8, 8), np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (count, labels), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def decathlon(folder: Path) -> bytes:
    ramp = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    nibabel.save(nibabel.Nifti1Image(ramp, np.eye(4)), folder / "image.nii.gz")
    nibabel.save(nibabel.Nifti1Image((ramp > 9).astype(np.uint8), np.eye(4)), folder / "label.nii.gz")
    pair = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    members = {
        "Tiny/dataset.json": json.dumps({"labels": {"0": "background", "1": "it"}, "training": [pair]}).encode(),
        "Tiny/imagesTr/a.nii.gz": (folder / "image.nii.gz").read_bytes(),
        "Tiny/imagesTr/._a.nii.gz": b"a resource fork",
        "Tiny/labelsTr/a.nii.gz": (folder / "label.nii.gz").read_bytes(),
    }
    return tar(folder / "tiny.tar", members).read_bytes()


def series(name: str, *, wrong: bool = False, short: bool = False, stamp: int = 1980) -> bytes:
    images = {f"0000000{n}.dcm": f"{name} {n}".encode() for n in (1, 2)}
    table = "Filename,MD5Hash\n" + "".join(f"{n},{hashlib.md5(c).hexdigest()}\n" for n, c in images.items())
    if wrong:
        images["00000002.dcm"] = b"changed"
    if short:
        del images["00000002.dcm"]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file, data in {"LICENSE": b"CC BY 4.0", **images, "md5hashes.csv": table.encode()}.items():
            archive.writestr(zipfile.ZipInfo(file, (stamp, 1, 1, 0, 0, 0)), data)
    return content.getvalue()


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """Three sets, published behind a mirror: a file, an archive, a collection of three series."""
    pictures, task = archive_of_pictures(), decathlon(tmp_path)

    def published(**what: object) -> PublicSet:
        common = {"title": "made up", "licence": "CC0", "citation": "nobody", "modality": "mri", "sums": "this test"}
        return PublicSet(**(common | what))  # type: ignore[arg-type]

    def file(name: str, content: bytes, **what: bool) -> tuple[PublicFile, ...]:
        return (PublicFile(f"https://example.org/{name}?download=1", name, hashlib.md5(content).hexdigest(), **what),)

    monkeypatch.setitem(PUBLIC_SETS, "pictures", published(modality="xray", files=file("pictures.npz", pictures)))
    unknown = (PublicFile("https://example.org/pictures.npz?download=1", "pictures.npz"),)
    monkeypatch.setitem(PUBLIC_SETS, "unsummed", published(modality="xray", files=unknown, sums=None))
    monkeypatch.setitem(PUBLIC_SETS, "Tiny", published(files=file("Tiny", task, archive=True)))
    monkeypatch.setitem(PUBLIC_SETS, "Collection", published(collection="Some MRI", dicom=("MR",)))
    rows = [
        {"SeriesInstanceUID": name, "ImageCount": 2, "FileSize": 14, "LicenseName": "CC0", "PatientID": "Doe^Jane"}
        for name in SERIES
    ]
    with serving() as found:
        found.files = {
            "/example.org/pictures.npz?download=1": pictures,
            "/example.org/Tiny?download=1": task,
            path_of(f"{API_URL}/getSeries?Collection=Some+MRI&Modality=MR&format=json"): json.dumps(rows).encode(),
            **{series_path(name): series(name) for name in SERIES},
        }
        monkeypatch.setenv("MEDIM_MIRROR", found.url)
        monkeypatch.setenv("MEDIM_CACHE", str(tmp_path / "cache"))
        yield found


def series_path(name: str) -> str:
    return path_of(f"{API_URL}/getImageWithMD5Hash?SeriesInstanceUID={name}")


def bring(name: str, out: Path) -> FetchResult:
    return fetch_public_set(name, out, pause=lambda _: None)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_every_set_of_the_table_has_terms_and_a_secure_address_and_an_md5_or_says_so() -> None:
    for name, about in PUBLIC_SETS.items():
        assert bool(about.files) != bool(about.collection), name
        assert all([about.licence, about.citation, about.title, about.sums]), name
        for file in about.files:
            assert urlsplit(file.url).scheme == "https", name
            assert file.md5 is not None, name
            assert len(bytes.fromhex(file.md5)) == 16, name
    assert API_URL.startswith("https://")
    sums = [file.md5 for about in PUBLIC_SETS.values() for file in about.files]
    assert len(set(sums)) == len(sums)


def test_a_set_comes_with_its_record_and_sums_that_sha256sum_can_check(publisher: Publisher, tmp_path: Path) -> None:
    got = bring("pictures", tmp_path / "set")
    assert got.is_new
    assert files(tmp_path / "set") == [".medim", "SHA256SUMS", "fetched.json", "pictures.npz"]
    record = json.loads((tmp_path / "set" / "fetched.json").read_text())
    assert [record[key] for key in ("schema_version", "name", "licence", "citation")] == [
        1,
        "pictures",
        "CC0",
        "nobody",
    ]
    content = publisher.files["/example.org/pictures.npz?download=1"]
    (entry,) = record["archives"]
    assert entry["url"] == "https://example.org/pictures.npz?download=1"
    assert entry["sha256"] == hashlib.sha256(content).hexdigest()
    assert entry["publisher"] == {"md5": hashlib.md5(content).hexdigest(), "from": "this test", "matched": True}
    checked = subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=tmp_path / "set", check=False)
    assert checked.returncode == 0


def test_a_second_call_checks_every_file_and_asks_nobody(publisher: Publisher, tmp_path: Path) -> None:
    bring("pictures", tmp_path / "set")
    publisher.asked.clear()
    assert not bring("PICTURES", tmp_path / "set").is_new
    assert publisher.asked == []
    (tmp_path / "set" / "pictures.npz").write_bytes(b"changed")
    with pytest.raises(UserError, match=r"missing or changed since the download, such as pictures\.npz.*Move"):
        bring("pictures", tmp_path / "set")


def test_an_archive_becomes_a_folder_that_is_read_like_any_other(publisher: Publisher, tmp_path: Path) -> None:
    bring("Tiny", tmp_path / "set")
    assert files(tmp_path / "set" / "Tiny") == ["dataset.json", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz"]
    index = build_index(tmp_path / "set", "mri")
    assert (len(index.records), index.rejected) == (1, ())
    (tmp_path / "set" / "Tiny" / "labelsTr" / "a.nii.gz").unlink()
    with pytest.raises(UserError, match="missing or changed"):
        bring("Tiny", tmp_path / "set")


OUTSIDE: list[dict[str, Any]] = [
    {"file": "../../outside"},
    {"file": "/tmp/outside"},
    {"url": "https://example.org/other"},
    {"publisher": None},
]
WRONG_FILE: list[dict[str, Any]] = [{"publisher": {"md5": None, "from": None, "matched": None}}, {"archive": True}]


@pytest.mark.parametrize(
    ("name", "change"),
    [*(("pictures", change) for change in OUTSIDE + WRONG_FILE), *(("Collection", change) for change in OUTSIDE)],
    ids=str,
)
def test_a_folder_from_elsewhere_decides_neither_address_nor_file(
    publisher: Publisher, tmp_path: Path, name: str, change: dict[str, Any]
) -> None:
    bring(name, tmp_path / "a" / "set")
    record_path = tmp_path / "a" / "set" / "fetched.json"
    record = json.loads(record_path.read_text())
    record["archives"][0] |= {"sha256": None, **change}
    record_path.write_text(json.dumps(record))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"expected the files of this version's catalog|is missing or invalid"):
        bring(name, tmp_path / "a" / "set")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_in_the_download_folder_is_not_followed(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "set" / ".download").mkdir(parents=True)
    (tmp_path / "set" / ".medim").touch()
    (tmp_path / "set" / ".download" / "pictures.npz").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="expected no links"):
        bring("pictures", tmp_path / "set")
    assert not (tmp_path / "outside").exists()


def test_what_was_removed_comes_again_and_must_be_what_it_was(publisher: Publisher, tmp_path: Path) -> None:
    bring("unsummed", tmp_path / "set")
    (tmp_path / "set" / "pictures.npz").unlink()
    assert bring("unsummed", tmp_path / "set").is_new
    (tmp_path / "set" / "pictures.npz").unlink()
    publisher.files["/example.org/pictures.npz?download=1"] = archive_of_pictures(labels=2)
    before = (tmp_path / "set" / "fetched.json").read_bytes()
    with pytest.raises(UserError, match="the publisher has changed this file since"):
        bring("unsummed", tmp_path / "set")
    assert files(tmp_path / "set") == [".medim", "SHA256SUMS", "fetched.json"]
    assert (tmp_path / "set" / "fetched.json").read_bytes() == before


def test_no_publishers_sum_is_told_and_none_is_made_up(publisher: Publisher, tmp_path: Path) -> None:
    record = bring("unsummed", tmp_path / "set").manifest
    assert record["archives"][0]["publisher"] == {"md5": None, "from": None, "matched": None}
    assert "unsummed: no published checksum" in CliRunner().invoke(app, ["fetch", "--list"]).output


@pytest.mark.parametrize(
    ("name", "path"),
    [("pictures", "/example.org/pictures.npz?download=1"), ("Tiny", "/example.org/Tiny?download=1")],
)
def test_a_failure_leaves_no_folder_behind(publisher: Publisher, name: str, path: str, tmp_path: Path) -> None:
    for content in (None, b"another file"):
        publisher.files[path] = content  # type: ignore[assignment]
        with pytest.raises(UserError):
            bring(name, tmp_path / "set")
        assert not (tmp_path / "set").exists()


def test_a_collection_comes_series_by_series_each_by_the_archives_own_sums(
    publisher: Publisher, tmp_path: Path
) -> None:
    done: list[tuple[int, int]] = []
    got = fetch_public_set("Collection", tmp_path / "set", progress=lambda *said: done.append(said))
    assert files(tmp_path / "set" / "1.2.31") == ["00000001.dcm", "00000002.dcm", "LICENSE"]
    assert [entry["publisher"]["matched"] for entry in got.manifest["archives"]] == [True] * 3
    assert done == [(14, 42), (28, 42), (42, 42)]
    assert "Doe" not in (tmp_path / "set" / "fetched.json").read_text()
    publisher.asked.clear()
    assert not bring("Collection", tmp_path / "set").is_new
    assert publisher.asked == []


def test_a_fetch_that_ended_between_two_series_goes_on_with_the_next(publisher: Publisher, tmp_path: Path) -> None:
    there = publisher.files.pop(series_path(SERIES[1]))
    with pytest.raises(UserError, match="HTTP 404"):
        bring("Collection", tmp_path / "set")
    assert files(tmp_path / "set" / SERIES[0]) == ["00000001.dcm", "00000002.dcm", "LICENSE"]
    publisher.files[series_path(SERIES[1])] = there
    publisher.asked.clear()
    assert bring("Collection", tmp_path / "set").is_new
    assert [path for path, _ in publisher.asked] == [series_path(name) for name in SERIES[1:]]


def test_a_series_packed_anew_is_the_same_series(publisher: Publisher, tmp_path: Path) -> None:
    bring("Collection", tmp_path / "set")
    (tmp_path / "set" / SERIES[0]).rename(tmp_path / "moved")
    publisher.files[series_path(SERIES[0])] = series(SERIES[0], stamp=1999)
    assert bring("Collection", tmp_path / "set").is_new
    assert files(tmp_path / "set" / SERIES[0]) == files(tmp_path / "moved")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (series(SERIES[0], wrong=True), "00000002.dcm does not match its md5 sum"),
        (series(SERIES[0], short=True), "expected 2 files, got 1"),
        (b"<html>maintenance</html>", "damaged"),
    ],
)
def test_a_series_that_is_not_as_announced_is_not_kept(
    publisher: Publisher, content: bytes, said: str, tmp_path: Path
) -> None:
    publisher.files[series_path(SERIES[0])] = content
    with pytest.raises(UserError, match=said):
        bring("Collection", tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "expected MR series in the collection Some MRI, got none"),
        (b"[]", "got none"),
        (b"<html>", "expected a JSON list"),
        (b'[{"SeriesInstanceUID": "../../etc"}]', "one without a SeriesInstanceUID"),
    ],
)
def test_an_archive_that_lists_nothing_usable_is_told(
    publisher: Publisher, answer: bytes, said: str, tmp_path: Path
) -> None:
    publisher.files[path_of(f"{API_URL}/getSeries?Collection=Some+MRI&Modality=MR&format=json")] = answer
    with pytest.raises(UserError, match=said):
        bring("Collection", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_process_killed_before_the_files_had_their_names_goes_on(publisher: Publisher, tmp_path: Path) -> None:
    bring("Tiny", tmp_path / "set")
    (tmp_path / "set" / ".download").mkdir()
    (tmp_path / "set" / "Tiny").rename(tmp_path / "set" / ".download" / "Tiny")
    (tmp_path / "set" / ".download" / "Tiny.archive").write_bytes(publisher.files["/example.org/Tiny?download=1"])
    publisher.asked.clear()
    bring("Tiny", tmp_path / "set")
    assert files(tmp_path / "set" / "Tiny") == ["dataset.json", "imagesTr/a.nii.gz", "labelsTr/a.nii.gz"]
    assert publisher.asked == []
    assert not (tmp_path / "set" / ".download").exists()


def test_a_process_killed_between_the_checksums_and_the_record_goes_on(publisher: Publisher, tmp_path: Path) -> None:
    bring("Tiny", tmp_path / "set")
    record = (tmp_path / "set" / "fetched.json").read_bytes()
    (tmp_path / "set" / "fetched.json").unlink()
    (tmp_path / "set" / ".fetched.json.12345678.medim-part").write_bytes(record[:10])
    (tmp_path / "set" / ".download").mkdir()
    (tmp_path / "set" / "Tiny").rename(tmp_path / "set" / ".download" / "Tiny")
    bring("Tiny", tmp_path / "set")
    assert (tmp_path / "set" / "fetched.json").read_bytes() == record
    assert {path.name for path in (tmp_path / "set").iterdir()} == {".medim", "Tiny", "SHA256SUMS", "fetched.json"}


def test_two_at_once_do_the_work_once(publisher: Publisher, tmp_path: Path) -> None:
    got: list[FetchResult] = []
    both = [threading.Thread(target=lambda: got.append(bring("pictures", tmp_path / "set"))) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(each.is_new for each in got) == [False, True]
    assert len(publisher.asked) == 1


def test_one_that_waited_for_another_that_failed_has_the_folder_to_itself(
    publisher: Publisher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one before removes the file that both locked."""
    marker = tmp_path / "set" / ".medim"
    marker.parent.mkdir()
    refused: list[bool] = []

    def look(done: int, total: int) -> None:
        with marker.open("a") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                refused.append(True)

    waiting = threading.Thread(target=lambda: fetch_public_set("pictures", tmp_path / "set", progress=look))
    with marker.open("a") as file, caplog.at_level("INFO", logger="medim.output_folder"):
        fcntl.flock(file, fcntl.LOCK_EX)
        waiting.start()
        while "waiting for it" not in caplog.text:
            time.sleep(0.005)
        marker.unlink()
        marker.parent.rmdir()
    waiting.join()
    assert refused
    assert (tmp_path / "set" / "pictures.npz").is_file()


def test_a_folder_that_holds_something_else_is_left_alone(publisher: Publisher, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="new or empty folder"):
        bring("pictures", tmp_path / "mine")
    bring("pictures", tmp_path / "set")
    with pytest.raises(UserError, match="expected Tiny, got pictures"):
        bring("Tiny", tmp_path / "set")
    assert files(tmp_path / "mine") == ["notes.txt"]


def test_data_takes_the_name_of_a_set_that_was_fetched(publisher: Publisher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run: medim fetch pictures"):
        open_source(Path("Pictures"), "xray")
    assert publisher.asked == []
    assert fetch_public_set("pictures").folder == locate_public_folder("pictures")
    assert len(open_source(Path("Pictures"), "xray")[0].records) == 12
    with pytest.raises(UserError, match="this public data set has xray"):
        open_source(Path("pictures"), "mri")
    (locate_public_folder("pictures") / "pictures.npz").unlink()
    with pytest.raises(UserError, match="missing or incomplete"):
        open_source(Path("pictures"), "xray")


def test_a_path_wins_over_the_name_of_a_set(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_public_set("pictures")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    np.save(tmp_path / "pictures" / "one.npy", np.arange(64.0).reshape(8, 8))
    assert len(open_source(Path("pictures"), "xray")[0].records) == 1


def test_many_labels_an_image_are_findings(publisher: Publisher, tmp_path: Path) -> None:
    names = "atelectasis cardiomegaly effusion infiltration mass nodule pneumonia pneumothorax consolidation edema "
    names += "emphysema fibrosis pleural hernia"
    for stem, expected in (("chest", list(map(str, range(14)))), ("chestmnist_64", names.split())):
        (tmp_path / f"{stem}.npz").write_bytes(archive_of_pictures(labels=14))
        index = build_index(tmp_path / f"{stem}.npz", "xray")
        assert len(index.records) == 12
        assert all([part[1:] for part in (r.label or "").split("|")] == expected for r in index.records)
    assert "14 findings" in PUBLIC_SETS["chestmnist"].title


def test_the_list_of_sets_is_a_table_with_sizes_and_purposes() -> None:
    lines = CliRunner().invoke(app, ["fetch", "--list"]).output.splitlines()
    assert lines[0].split() == ["name", "modality", "images", "size", "licence", "for", "content"]
    rows = {line.split()[0]: line.split("  ") for line in lines[1 : 1 + len(PUBLIC_SETS)]}
    assert list(rows) == list(PUBLIC_SETS)
    cells = [cell.strip() for cell in rows["chestmnist_224"] if cell]
    assert cells[1:6] == ["xray", "112,120", "3,889 MB", "CC BY 4.0", "classification, 14 findings per image"]
    assert [name for name, row in rows.items() if "unknown" in [cell.strip() for cell in row]] == [
        "chestmnist",
        "chestmnist_128",
        "Task02_Heart",
        "QIN-PROSTATE-Repeatability",
        "COVID-19-AR",
    ]


def test_the_command_writes_checks_and_lists(publisher: Publisher, tmp_path: Path) -> None:
    command = ["fetch", "pictures", "--out", str(tmp_path / "set")]
    first, second = (CliRunner().invoke(app, command) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "written to" in first.output
    assert "was there, every file as it was fetched" in second.output
    listed = CliRunner().invoke(app, ["fetch", "--list"]).output
    assert all(name in listed for name in PUBLIC_SETS)


@pytest.mark.parametrize(("words", "said"), [(["pneumonia-mnist"], "Did you mean pneumoniamnist"), ([], "--list")])
def test_no_name_or_a_wrong_one_is_wrong_usage(words: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["fetch", *words])
    assert result.exit_code == 2
    assert said in result.output


def test_a_name_that_no_set_has_is_not_guessed() -> None:
    with pytest.raises(UsageError, match="expected the name of a public data set"):
        fetch_public_set("imagenet")
