from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from medim.data.public.download import MAX_ATTEMPTS, apply_mirror, download_file
from medim.types import UserError
from tests.data.public_server import Publisher, serving

CONTENT = bytes(range(256)) * 400
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    with serving() as found:
        found.files["/set.npz"] = CONTENT
        yield found


def bring(publisher: Publisher, folder: Path, waits: list[float] | None = None, md5: str | None = MD5) -> Path:
    path = folder / "set.npz"
    download_file(f"{publisher.url}/set.npz", path, md5=md5, pause=(waits if waits is not None else []).append)
    return path


def test_a_file_comes_whole_and_leaves_nothing_beside_it(publisher: Publisher, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    sums = download_file(f"{publisher.url}/set.npz", tmp_path / "set.npz", progress=lambda *said: done.append(said))
    assert (tmp_path / "set.npz").read_bytes() == CONTENT
    assert (sums.size, sums.md5, sums.sha256) == (len(CONTENT), MD5, hashlib.sha256(CONTENT).hexdigest())
    assert done[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


def test_a_cut_connection_is_continued_where_it_was_cut(publisher: Publisher, tmp_path: Path) -> None:
    publisher.cuts = [1000, 500]
    waits: list[float] = []
    assert bring(publisher, tmp_path, waits).read_bytes() == CONTENT
    assert [wanted for _, wanted in publisher.asked] == [None, "bytes=1000-", "bytes=1500-"]
    assert waits == [1.0, 1.0]  # every try brought something, so patience starts over


def test_a_server_without_ranges_starts_over(publisher: Publisher, tmp_path: Path) -> None:
    publisher.ranges, publisher.cuts = False, [1000]
    assert bring(publisher, tmp_path).read_bytes() == CONTENT


def test_a_server_that_does_not_say_the_length_is_believed_at_the_end(publisher: Publisher, tmp_path: Path) -> None:
    publisher.announced = -1
    assert bring(publisher, tmp_path).read_bytes() == CONTENT


def test_a_stream_without_a_length_that_is_cut_is_not_taken_for_whole(publisher: Publisher, tmp_path: Path) -> None:
    publisher.chunked, publisher.ranges, publisher.cuts = True, False, [1000]
    assert bring(publisher, tmp_path, md5=None).read_bytes() == CONTENT
    assert len(publisher.asked) == 2


def test_what_came_before_the_process_ended_is_continued_by_the_next(publisher: Publisher, tmp_path: Path) -> None:
    publisher.cuts = [70_000] + [0] * (MAX_ATTEMPTS - 1)
    waits: list[float] = []
    with pytest.raises(UserError, match=r"70000 of 102400 bytes.*it continues"):
        bring(publisher, tmp_path, waits)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set.npz.part", "set.npz.part.json"]
    publisher.asked.clear()
    assert bring(publisher, tmp_path).read_bytes() == CONTENT
    assert publisher.asked == [("/set.npz", "bytes=70000-")]


def test_a_part_of_a_file_that_has_changed_since_is_not_continued(publisher: Publisher, tmp_path: Path) -> None:
    publisher.cuts = [1000] + [0] * (MAX_ATTEMPTS - 1)
    with pytest.raises(UserError, match="without progress"):
        bring(publisher, tmp_path)
    publisher.files["/set.npz"], publisher.etag = CONTENT[::-1], '"2"'
    assert bring(publisher, tmp_path, md5=None).read_bytes() == CONTENT[::-1]


def test_a_part_longer_than_the_file_starts_over(publisher: Publisher, tmp_path: Path) -> None:
    publisher.cuts = [1000] + [0] * (MAX_ATTEMPTS - 1)
    with pytest.raises(UserError, match="without progress"):
        bring(publisher, tmp_path)
    (tmp_path / "set.npz.part").write_bytes(CONTENT * 2)
    publisher.statuses = [416]
    assert bring(publisher, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_refusal_that_passes_is_waited_for(publisher: Publisher, status: int, tmp_path: Path) -> None:
    publisher.statuses = [status, status]
    waits: list[float] = []
    assert bring(publisher, tmp_path, waits).read_bytes() == CONTENT
    assert waits == [1.0, 2.0]


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_that_stays_is_told_at_once(publisher: Publisher, status: int, tmp_path: Path) -> None:
    publisher.statuses = [status]
    with pytest.raises(UserError, match=f"HTTP {status}"):
        bring(publisher, tmp_path)
    assert len(publisher.asked) == 1
    assert list(tmp_path.iterdir()) == []


def test_nobody_listening_is_told_after_some_tries(tmp_path: Path) -> None:
    with serving() as gone:
        pass
    waits: list[float] = []
    with pytest.raises(UserError, match=f"{MAX_ATTEMPTS} tries"):
        bring(gone, tmp_path, waits)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_publishers_is_removed(publisher: Publisher, tmp_path: Path) -> None:
    publisher.files["/set.npz"] = CONTENT[::-1]
    with pytest.raises(UserError, match=f"expected a file with the md5 {MD5}, got"):
        bring(publisher, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_length_that_the_server_never_keeps_is_told(publisher: Publisher, tmp_path: Path) -> None:
    publisher.announced = len(CONTENT) + 5
    publisher.ranges = False
    with pytest.raises(UserError, match="ended after 102400 of 102405 bytes"):
        bring(publisher, tmp_path)
    publisher.announced = 5
    with pytest.raises(UserError, match=r"got \w+ \(5 bytes\)"):
        bring(publisher, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_told_before_the_download(
    publisher: Publisher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match="expected 0 MB free"):
        bring(publisher, tmp_path)
    assert not (tmp_path / "set.npz").exists()


def test_a_disk_that_fills_up_on_the_way_keeps_what_came(publisher: Publisher, tmp_path: Path) -> None:
    def full(done: int, _: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*The partial download is kept"):
        download_file(f"{publisher.url}/set.npz", tmp_path / "set.npz", md5=MD5, progress=full)
    assert (tmp_path / "set.npz.part").stat().st_size > 0
    assert bring(publisher, tmp_path).read_bytes() == CONTENT


def test_a_redirection_to_something_that_is_no_http_is_not_followed(publisher: Publisher, tmp_path: Path) -> None:
    publisher.redirect = "ftp://127.0.0.1/set.npz"
    with pytest.raises(UserError, match="expected a redirection to https"):
        bring(publisher, tmp_path)


def test_other_addresses_than_http_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(UserError, match="starts with https"):
        download_file((tmp_path / "secret").as_uri(), tmp_path / "copy")


def test_a_mirror_stands_in_for_every_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDIM_MIRROR", "https://mirror.hospital/public/")
    assert (
        apply_mirror("https://zenodo.org/a/b.npz?download=1")
        == "https://mirror.hospital/public/zenodo.org/a/b.npz?download=1"
    )
    for wrong in ("mirror.hospital", "file:///tmp", "https://user:secret@mirror.hospital"):
        monkeypatch.setenv("MEDIM_MIRROR", wrong)
        with pytest.raises(UserError, match="MEDIM_MIRROR: expected an address") as error:
            apply_mirror("https://zenodo.org/a/b.npz")
        assert "secret" not in str(error.value)
