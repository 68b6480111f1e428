"""Small MR series with real geometry, a sender, and a destination that counts what it stores."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pynetdicom import AE, build_context, evt
from pynetdicom.sop_class import Comprehensive3DSRStorage, SegmentationStorage  # type: ignore[attr-defined]

ORIENTATION = [0.0, 1.0, 0.0, 0.0, 0.0, -1.0]  # sagittal, as most volumes of shared/data/mri-dicom
ROWS, COLUMNS = 24, 20


def make_series(number: int, n_slices: int = 8, **attributes: Any) -> list[Dataset]:
    """An MR series of parallel slices, with noise that depends on its number."""
    rng = np.random.default_rng(number)
    root = f"1.2.826.0.1.3680043.8.498.{number + 1}"
    datasets = []
    for k in range(n_slices):
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.SOPClassUID, dataset.SOPInstanceUID = MRImageStorage, f"{root}.3.{k}"
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"{root}.1", f"{root}.2"
        dataset.FrameOfReferenceUID = f"{root}.4"
        dataset.PatientName, dataset.PatientID = f"Test^Subject{number}", f"T{number:05d}"
        dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "MR", 1, k + 1
        dataset.ImageType = ["ORIGINAL", "PRIMARY"]
        dataset.ImagePositionPatient = [1.5 * k, 0.0, 0.0]
        dataset.ImageOrientationPatient, dataset.PixelSpacing = ORIENTATION, [1.0, 1.0]
        dataset.SliceThickness = 1.5
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
        dataset.PhotometricInterpretation = "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
        dataset.PixelData = rng.integers(0, 1000, (ROWS, COLUMNS)).astype(np.uint16).tobytes()
        for keyword, value in attributes.items():
            setattr(dataset, keyword, value)
        datasets.append(dataset)
    return datasets


def renew_uids(datasets: Iterable[Dataset], number: int) -> list[Dataset]:
    """Give the slices of a series the UIDs of another one."""
    series, study = (
        generate_uid(entropy_srcs=["series", str(number)]),
        generate_uid(entropy_srcs=["study", str(number)]),
    )
    copies = []
    for k, dataset in enumerate(datasets):
        copy = deepcopy(dataset)
        copy.SeriesInstanceUID, copy.StudyInstanceUID = series, study
        copy.SOPInstanceUID = generate_uid(entropy_srcs=[f"image {number} {k}"])
        copy.file_meta.MediaStorageSOPInstanceUID = copy.SOPInstanceUID
        copies.append(copy)
    return copies


def free_port() -> int:
    """A TCP port of the loopback that nothing listens on."""
    with socket.socket() as any_socket:
        any_socket.bind(("127.0.0.1", 0))
        return int(any_socket.getsockname()[1])


def send(
    datasets: Sequence[Dataset], port: int, *, calling: str = "SCANNER", called: str = "MEDIM", **options: Any
) -> list[int | None]:
    """Send over one association; the status of each object, None without a response or an association."""
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = 10
    for sop_class, syntax in {(d.SOPClassUID, d.file_meta.TransferSyntaxUID) for d in datasets}:
        entity.add_requested_context(sop_class, syntax)
    association = entity.associate("127.0.0.1", port, ae_title=called, **options)
    statuses: list[int | None] = []
    for dataset in datasets:
        if not association.is_established:
            break
        response = association.send_c_store(dataset)
        statuses.append(int(response.Status) if "Status" in response else None)
    if association.is_established:
        association.release()
    return statuses + [None] * (len(datasets) - len(statuses))


def send_all(datasets: Sequence[Dataset], port: int, **options: Any) -> None:
    """Send until each object has been confirmed, as a PACS does."""
    left, end, statuses = list(datasets), time.monotonic() + 120, list[int | None]()
    while left:
        assert time.monotonic() < end, f"{len(left)} objects were not confirmed: {set(statuses)}"
        statuses = send(left, port, **options)
        left = [dataset for dataset, status in zip(left, statuses, strict=True) if status != 0]
        time.sleep(0.2 if left else 0.0)


class Archive:
    """A storage SCP that counts each object by its UID.

    Attributes:
        objects: content of each object by its SOPInstanceUID.
        deliveries: number of times that each object arrived.
        statuses: responses to the next objects; then success.
    """

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.objects: dict[str, Dataset] = {}
        self.deliveries: Counter[str] = Counter()
        self.statuses: list[int] = []
        self._lock = threading.Lock()
        self._server: Any = None

    def __enter__(self) -> Archive:
        entity = AE("ARCHIVE")
        entity.supported_contexts = [
            build_context(sop_class, ExplicitVRLittleEndian)
            for sop_class in (SegmentationStorage, Comprehensive3DSRStorage)
        ]
        self._server = entity.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self.store)]
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()

    def store(self, event: Any) -> int:
        with self._lock:
            if self.statuses and (status := self.statuses.pop(0)):
                return status
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            self.deliveries[str(dataset.SOPInstanceUID)] += 1
            self.objects[str(dataset.SOPInstanceUID)] = dataset
        return 0

    def series(self) -> Counter[str]:
        """The number of segmentations by source series."""
        with self._lock:
            return Counter(
                str(one.ReferencedSeriesSequence[0].SeriesInstanceUID)
                for one in self.objects.values()
                if one.SOPClassUID == SegmentationStorage
            )


def write_slices(datasets: Sequence[Dataset], folder: Path) -> list[Path]:
    """Write a series to files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, dataset in enumerate(datasets):
        path = folder / f"{k}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
