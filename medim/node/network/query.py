"""C-FIND for the number of images of a series in an archive."""

from __future__ import annotations

from pathlib import Path

from pydicom.dataset import Dataset
from pynetdicom import AE
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]

from medim.data.readers import ReadError
from medim.data.readers.dicom.header_scan import scan_header
from medim.node.network.association import open_association
from medim.node.settings import Destination, TlsFiles

_UID_KEYWORDS = frozenset(("StudyInstanceUID", "SeriesInstanceUID"))


def count_series_images(path: Path, archive: Destination, ae_title: str, tls: TlsFiles | None) -> int:
    """Query an archive for NumberOfSeriesRelatedInstances of the series of an image.

    Args:
        path: an image of the series.
        archive: application entity with the study root query model.
        ae_title: AE title of the node.
        tls: certificates; None for a connection without encryption.

    Returns:
        The number of images; 0 if the archive does not respond or does not support the attribute.
    """
    try:
        header = scan_header(path, _UID_KEYWORDS).header
    except (OSError, ReadError):
        return 0
    query = Dataset()
    query.QueryRetrieveLevel = "SERIES"
    query.StudyInstanceUID = header.text("StudyInstanceUID")
    query.SeriesInstanceUID = header.text("SeriesInstanceUID")
    query.NumberOfSeriesRelatedInstances = None
    entity = AE(ae_title)
    entity.add_requested_context(StudyRootQueryRetrieveInformationModelFind)
    with open_association(entity, archive, tls) as association:
        if association is None:
            return 0
        for status, identifier in association.send_c_find(query, StudyRootQueryRetrieveInformationModelFind):
            if status and status.Status in {0xFF00, 0xFF01} and identifier is not None:
                return _read_number(identifier)
    return 0


def _read_number(identifier: Dataset) -> int:
    """Read the number of images of a response; 0 if it is absent or invalid."""
    try:
        return max(int(identifier.get("NumberOfSeriesRelatedInstances") or 0), 0)
    except (TypeError, ValueError):
        return 0
