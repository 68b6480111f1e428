"""A visit to a PACS: start Orthanc, send files by C-STORE, fetch them back by DICOMweb, stop it.

Run in a network namespace of its own (`unshare -n`), where nothing but Orthanc listens and nothing leaves:
`python -m tests.hospital.visit FOLDER FILE...` writes what came back to FOLDER/back, by SOPInstanceUID.
"""

from __future__ import annotations

import base64
import email
import fcntl
import json
import secrets
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
from pynetdicom import AE
from pynetdicom.sop_class import Verification

HTTP, DICOM = 18042, 14242
PASSWORD = secrets.token_hex(16)
PLUGINS = "/usr/share/orthanc/plugins"


def main(folder: Path, files: list[Path]) -> None:
    loopback_up()
    with orthanc(folder):
        store(files)
        for file in files:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            path = folder / "back" / f"{header.SOPInstanceUID}.dcm"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(fetch(header.StudyInstanceUID, header.SeriesInstanceUID, header.SOPInstanceUID))


def loopback_up() -> None:
    """What `ip link set lo up` does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # SIOCSIFFLAGS: up, running


@contextmanager
def orthanc(folder: Path) -> Iterator[None]:
    """An Orthanc with nothing in it, that takes objects from MEDIM alone."""
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [PLUGINS],
        "HttpPort": HTTP,
        "DicomPort": DICOM,
        "DicomAet": "ORTHANC",
        "DicomCheckCalledAet": True,
        "DicomAlwaysAllowStore": False,
        "DicomModalities": {"medim": {"AET": "MEDIM", "Host": "127.0.0.1", "Port": 11112, "AllowStore": True}},
        "UnknownSopClassAccepted": True,  # Label Map Segmentation is younger than Debian's Orthanc
        "AuthenticationEnabled": True,
        "RegisteredUsers": {"medim": PASSWORD},
        "DicomWeb": {"Enable": True},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "orthanc.log").open("w") as log:
        process = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
        try:
            wait(process, folder / "orthanc.log")
            yield
        finally:
            process.terminate()
            process.wait(timeout=20)


def wait(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it answers an echo."""
    until = time.monotonic() + 30
    while time.monotonic() < until and process.poll() is None:
        entity = AE("MEDIM")
        entity.add_requested_context(Verification)
        association = entity.associate("127.0.0.1", DICOM, ae_title="ORTHANC")
        if association.is_established:
            association.send_c_echo()
            association.release()
            return
        time.sleep(0.1)
    raise RuntimeError(f"Orthanc did not start:\n{log.read_text()[-2000:]}")


def store(files: list[Path]) -> None:
    """Send by C-STORE; every one must be taken with status 0."""
    datasets = [pydicom.dcmread(file) for file in files]
    entity = AE("MEDIM")
    for dataset in datasets:
        entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
    association = entity.associate("127.0.0.1", DICOM, ae_title="ORTHANC")
    assert association.is_established
    for dataset, file in zip(datasets, files, strict=True):
        status = association.send_c_store(dataset)
        assert "Status" in status, f"{file.name}: no answer"
        assert status.Status == 0, f"{file.name}: {status}"
    association.release()


def fetch(study: str, series: str, instance: str) -> bytes:
    """Retrieve an instance by WADO-RS."""
    address = f"http://127.0.0.1:{HTTP}/dicom-web/studies/{study}/series/{series}/instances/{instance}"
    key = base64.b64encode(f"medim:{PASSWORD}".encode()).decode()
    headers = {"Authorization": f"Basic {key}", "Accept": 'multipart/related; type="application/dicom"'}
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        head = f"Content-Type: {answer.headers['Content-Type']}\r\n\r\n".encode()
        (part,) = email.message_from_bytes(head + answer.read()).get_payload()
    content: bytes = part.get_payload(decode=True)
    return content


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
