"""Content of `fetched.json`: origin and licence of a downloaded data set."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired  # pydantic needs this form before Python 3.12

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from medim.files import read_json
from medim.privacy import format_result_path
from medim.types import Modality, UserError

SCHEMA_VERSION = 1
Publisher = TypedDict("Publisher", {"md5": str | None, "from": str | None, "matched": bool | None})


class ExpectedSeries(TypedDict):
    """Number and total size of the files of a series, according to the archive."""

    images: int
    bytes: int


class Download(TypedDict):
    """One file, archive or series of a data set.

    Attributes:
        url: address at the publisher.
        file: name of the file or folder in the folder of the data set.
        archive: whether the download is unpacked.
        publisher: checksum of the publisher.
        expected: of a series of a collection.
        bytes: size of the download; None before it.
        sha256: digest of the download; None before it.
    """

    url: str
    file: str
    archive: bool
    publisher: Publisher
    expected: ExpectedSeries | None
    licence: NotRequired[str | None]
    bytes: int | None
    sha256: str | None


class Manifest(TypedDict):
    """Content of `fetched.json`."""

    schema_version: int
    name: str
    title: str
    modality: Modality
    licence: str
    citation: str
    fetched: str | None
    archives: list[Download]


_ADAPTER = TypeAdapter(Manifest)


def read_manifest(path: Path) -> Manifest:
    """Read `fetched.json`.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return _ADAPTER.validate_python(read_json(path, place=format_result_path(path)))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{format_result_path(path)}: '{place}' is missing or invalid. Use another --out to download the set."
        ) from None
