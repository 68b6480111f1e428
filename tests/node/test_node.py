"""Whole nodes with a real package: processes, kills, an archive, and what they write."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage

from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.node.journal import Journal, find_broken_event
from medim.node.processes import list_roles
from medim.node.settings import read_settings
from medim.node.spool import Spool
from medim.predict.predict import predict
from tests.export.packages import make_run
from tests.node.senders import Archive, free_port, make_series, renew_uids, send, send_all, write_slices

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("node")
    run = make_run(folder / "run", "segmenter")
    return export(run, folder / "package", ExportOptions(label_codes="hippocampus")).folder


class Node:
    """A running node.

    Attributes:
        port: port of the receiver.
        metrics: port of the metrics.
        spool: folder of the node.
        log: file of standard error.
    """

    def __init__(self, package: Path, folder: Path, *options: object) -> None:
        self.port, self.metrics = free_port(), free_port()
        self.spool, self.log = Spool(folder / "spool"), folder / "node.log"
        words = ["serve", package, "--spool", self.spool.root, "--listen", f"127.0.0.1:{self.port}"]
        words += ["--metrics", f"127.0.0.1:{self.metrics}", "--quiet-time", 1.5, "--min-free", 0, *options]
        self._command = [sys.executable, "-m", "medim.cli", *map(str, words)]
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self._command, stderr=log, stdout=log, cwd=REPOSITORY)
        try:
            wait_for(lambda: b"receiver-started" in self.log.read_bytes(), 60)
        except AssertionError:
            self.process.kill()
            raise

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def states(self) -> dict[str, int]:
        with sqlite3.connect(self.spool.journal, timeout=30) as database:
            return dict(database.execute("SELECT state || ' ' || reason, COUNT(*) FROM series GROUP BY 1").fetchall())

    def find_process(self, role: str) -> int | None:
        """The process ID of a role, by the command line of the children of the supervisor."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and role.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                    return int(folder.name)
            except (OSError, ValueError, IndexError):
                continue
        return None


@contextmanager
def node(package: Path, folder: Path, *options: object) -> Iterator[Node]:
    running = Node(package, folder, *options)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            assert running.stop() == 0


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.1)


def read_crop(data: Path) -> list[Dataset]:
    """A small volume with the geometry of a real scanner; its headers have ImagesInAcquisition."""
    return [pydicom.dcmread(path) for path in sorted((data / "mri-dicom" / "Study1" / "13_HCropVolume").glob("*.dcm"))]


def segmentations(archive: Archive) -> dict[str, Dataset]:
    """The segmentations by source series."""
    return {
        str(one.ReferencedSeriesSequence[0].SeriesInstanceUID): one
        for one in archive.objects.values()
        if one.SOPClassUID == SegmentationStorage
    }


def test_every_series_is_answered_once_through_kills_of_all_processes(
    segmenter: Path, shared_data: Path, tmp_path: Path
) -> None:
    rng = random.Random(0)
    crop = read_crop(shared_data)
    series = {number: renew_uids(crop, number) for number in range(6)}
    options = ("--forward", "ARCHIVE@127.0.0.1:{}", "--jobs", 1)
    with Archive() as archive:
        words = [str(word).format(archive.port) for word in options]
        with node(segmenter, tmp_path, *words) as running:
            senders = []
            for first in range(2):  # two senders, with shuffled and interleaved series, and a fifth of copies
                images = [image for number in range(first, 6, 2) for image in series[number]]
                images += rng.sample(images, len(images) // 5)
                rng.shuffle(images)
                senders.append(threading.Thread(target=send_all, args=[images, running.port], daemon=True))
            for sender in senders:
                sender.start()
            kills = 0
            roles = list_roles(read_settings(running.spool.root))
            end = time.monotonic() + 25
            while time.monotonic() < end and len(segmentations(archive)) < 6:
                time.sleep(rng.uniform(0.5, 2.5))
                victim = running.find_process(roles[kills % len(roles)])
                if victim is not None and kills < 8:
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
            for sender in senders:
                sender.join(60)
            wait_for(lambda: len(segmentations(archive)) == 6 and running.states() == {"answered ": 6}, 90)
            time.sleep(2)
        assert kills >= 4
        assert archive.series() == {images[0].SeriesInstanceUID: 1 for images in series.values()}
        assert len(archive.objects) == 12  # a segmentation and a report of each
    with sqlite3.connect(running.spool.journal) as database:
        assert database.execute("SELECT COUNT(*) FROM instance").fetchone() == (6 * len(crop),)
    assert find_broken_event(Journal(running.spool.journal)) is None
    (row,) = predict_again(segmenter, crop, tmp_path)
    for answer in segmentations(archive).values():
        np.testing.assert_array_equal(answer.pixel_array, row.pixel_array)


def predict_again(package: Path, images: list[Dataset], folder: Path) -> list[Dataset]:
    """The segmentation of the command `predict`."""
    from medim.package.package import load_package

    paths = write_slices(images, folder / "again")
    rows = predict(load_package(package), paths, folder / "answers", output_format="dicom")
    return [pydicom.dcmread(folder / "answers" / str(row["file"])) for row in rows]


def test_late_images_hold_the_series_and_the_operator_answers_it_again(segmenter: Path, tmp_path: Path) -> None:
    images = make_series(0)
    with (
        Archive() as archive,
        node(
            segmenter,
            tmp_path,
            "--forward",
            f"ARCHIVE@127.0.0.1:{archive.port}",
            "--unconfirmed",
            "answer",
            "--max-wait",
            4,
        ) as running,
    ):
        send(make_series(1)[:4] + make_series(1)[5:], running.port)  # a missing slice
        send(images[:-1], running.port)
        wait_for(lambda: len(archive.objects) == 2, 60)
        send(images[-1:], running.port)
        wait_for(lambda: running.states() == {"held late-instances": 1, "held missing-slices": 1}, 30)
        (key,) = [one.key for one in Journal(running.spool.journal).list_series() if one.reason == "late-instances"]
        retry = [sys.executable, "-m", "medim.cli", "serve", "retry", key, "--spool", str(running.spool.root)]
        subprocess.run(retry, check=True, cwd=REPOSITORY, capture_output=True)
        wait_for(lambda: len(archive.objects) == 4, 60)
        assert archive.series()[images[0].SeriesInstanceUID] == 2


def test_no_identity_is_in_the_journal_the_log_and_the_metrics(segmenter: Path, tmp_path: Path) -> None:
    planted = {
        "PatientName": "Zzyzx^Quillon", "PatientID": "Zzyzx4711", "PatientBirthDate": "19371123",
        "AccessionNumber": "Zzyzx12", "InstitutionName": "Quillon Hospital", "StudyDate": "19371123",
        "StationName": "ZZYZX", "ReferringPhysicianName": "Quillon^Z", "StudyDescription": "Zzyzx",
    }  # fmt: skip
    good = make_series(7, ImagesInAcquisition=8, **planted)
    localizer = make_series(8, 3, ImagesInAcquisition=3, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **planted)
    (broken,) = make_series(9, 1, **planted)
    broken.PatientAge = "Zzyzx"
    conflict = make_series(7, 1, SliceThickness=3, **planted)
    with (
        Archive() as archive,
        node(segmenter, tmp_path, "--forward", f"ARCHIVE@127.0.0.1:{archive.port}", "--max-wait", 3) as running,
    ):
        send(good, running.port, calling="ZZYZX^QUILLON")
        assert send(conflict, running.port) == [0xA900]
        send(localizer, running.port)
        send([broken], running.port)
        send([broken], running.port, called="QUILLON")
        wait_for(lambda: len(archive.objects) == 2 and len(running.states()) == 3, 60)
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{running.metrics}/metrics", timeout=10).read()
        assert running.states() == {"answered ": 1, "rejected localizer": 1, "held single-slice": 1}
        commands = [["status"], *(["show", one.key] for one in Journal(running.spool.journal).list_series())]
        outputs = [
            subprocess.run(
                [sys.executable, "-m", "medim.cli", "serve", *words, "--spool", str(running.spool.root)],
                check=True, cwd=REPOSITORY, capture_output=True,
            )
            for words in commands
        ]  # fmt: skip
    texts = [metrics, running.log.read_bytes(), *(one.stdout + one.stderr for one in outputs)]
    texts += [path.read_bytes() for path in running.spool.root.glob("*") if path.is_file()]
    texts += [str(path.relative_to(running.spool.root)).encode() for path in running.spool.root.rglob("*")]
    with sqlite3.connect(running.spool.journal) as database:
        texts.append("\n".join(database.iterdump()).encode())
    traces = [b"zzyzx", b"quillon", b"19371123", b"1937-11", *(one.SOPInstanceUID.encode() for one in good)]
    traces += [one[0].SeriesInstanceUID.encode() for one in (good, localizer, [broken])]
    assert len(texts) > 8
    assert [trace for trace in traces for text in texts if trace in text.lower()] == []
    assert any(b"Quillon" in path.read_bytes() for path in running.spool.outbox.iterdir())
