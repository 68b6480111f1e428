"""Whole nodes with a real package: processes, kills, an archive, and what they write."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import Comprehensive3DSRStorage, SegmentationStorage
from typer.testing import CliRunner

from medim.cli import app
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.node.journal import Journal, find_broken_event
from medim.node.processes import list_roles
from medim.node.settings import read_settings
from medim.predict.predict import predict
from tests.export.packages import make_run
from tests.node.harness import REPOSITORY, node, read_crop, wait_for
from tests.node.senders import Archive, make_series, renew_uids, send, send_all, write_slices

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("node")
    run = make_run(folder / "run", "segmenter")
    return export(run, folder / "package", ExportOptions(label_codes="hippocampus")).folder


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
            while kills < 4 or (time.monotonic() < end and len(segmentations(archive)) < 6):
                assert time.monotonic() < end + 100, f"{kills} kills"
                time.sleep(rng.uniform(0.5, 2.5))
                victim = running.find_process(roles[kills % len(roles)])
                if victim is not None and kills < 8:
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
            for sender in senders:
                sender.join(60)
            wait_for(lambda: len(segmentations(archive)) == 6 and running.states() == {"answered ": 6}, 90)
            time.sleep(2)
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
        retry = CliRunner().invoke(app, ["serve", "retry", key, "--spool", str(running.spool.root)])
        assert retry.exit_code == 0, retry.output
        wait_for(lambda: len(archive.objects) == 4, 60)
        assert archive.series()[images[0].SeriesInstanceUID] == 2
        reports = [one for one in archive.objects.values() if one.SOPClassUID == Comprehensive3DSRStorage]
        (replacement,) = [one for one in reports if "PredecessorDocumentsSequence" in one]
        study = replacement.PredecessorDocumentsSequence[0]
        reference = study.ReferencedSeriesSequence[0].ReferencedSOPSequence[0]
        assert {reference.ReferencedSOPInstanceUID, replacement.SOPInstanceUID} == {r.SOPInstanceUID for r in reports}


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
        states = {"answered ": 1, "rejected localizer": 1, "held single-slice": 1}
        wait_for(lambda: len(archive.objects) == 2 and running.states() == states, 60)
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{running.metrics}/metrics", timeout=10).read()
        commands = [["status"], *(["show", one.key] for one in Journal(running.spool.journal).list_series())]
        outputs = [CliRunner().invoke(app, ["serve", *words, "--spool", str(running.spool.root)]) for words in commands]
    assert [one.exit_code for one in outputs] == [0] * 4
    texts = [metrics, running.log.read_bytes(), *(one.output.encode() for one in outputs)]
    texts += [path.read_bytes() for path in running.spool.root.glob("*") if path.is_file()]
    texts += [str(path.relative_to(running.spool.root)).encode() for path in running.spool.root.rglob("*")]
    with sqlite3.connect(running.spool.journal) as database:
        texts.append("\n".join(database.iterdump()).encode())
    traces = [b"zzyzx", b"quillon", b"19371123", b"1937-11", *(one.SOPInstanceUID.encode() for one in good)]
    traces += [one[0].SeriesInstanceUID.encode() for one in (good, localizer, [broken])]
    assert len(texts) > 8
    assert [trace for trace in traces for text in texts if trace in text.lower()] == []
    assert any(b"Quillon" in path.read_bytes() for path in running.spool.outbox.iterdir())


def test_an_orthanc_sends_answers_queries_and_receives_each_answer_once(
    segmenter: Path, shared_data: Path, tmp_path: Path
) -> None:
    isolate = ["unshare", "--net"]
    if shutil.which("Orthanc") is None:
        pytest.skip("Orthanc is not installed: apt-get install --no-install-recommends orthanc orthanc-dicomweb")
    if subprocess.run([*isolate, "true"], capture_output=True, check=False).returncode:
        isolate += ["--map-root-user"]
        if subprocess.run([*isolate, "true"], capture_output=True, check=False).returncode:
            pytest.skip("no network namespace can be made here: expected root, or unprivileged user namespaces")
    crop = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume"
    visit = [*isolate, sys.executable, "-m", "tests.node.neighbour", tmp_path, segmenter, crop]
    result = subprocess.run(list(map(str, visit)), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts == {"orthanc": 96 + 6, "images": 96, "states": {"answered ": 3}}
