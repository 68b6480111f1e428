"""Images and series in the journal of a node."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from medim.privacy import make_pseudonym

SeriesState = Literal[
    "receiving", "ready", "predicting", "answered", "purged", "held", "rejected", "dead", "dropped"
]  # in the order of the work; the last four are the end of a series without an answer
StoreResult = Literal["stored", "duplicate", "conflict"]


@dataclass(frozen=True, kw_only=True)
class ReceivedInstance:
    """One image at its arrival.

    Attributes:
        series: key of its series, or of the image itself if it is complete alone.
        sop: key of its SOPInstanceUID.
        sha256: digest of its data set.
        n_bytes: size of its file.
        peer: name of the sender.
        association: number of the association; None after a restart.
        is_object: whether the image is complete alone.
        n_expected: number of images of the series according to the sender; 0 if unknown.
        n_acquired: ImagesInAcquisition; 0 if unknown.
    """

    series: str
    sop: str
    sha256: str
    n_bytes: int
    peer: str
    association: int | None = None
    is_object: bool = False
    n_expected: int = 0
    n_acquired: int = 0


@dataclass(frozen=True, kw_only=True)
class SeriesStatus:
    """State of a series.

    Attributes:
        key: key of the series.
        state: state.
        reason: reason of a state without an answer.
        first_at: time of the first image in seconds since 1970.
        last_at: time of the newest image.
        n_instances: number of images.
        n_expected: number of images according to the sender; 0 if unknown.
        n_acquired: ImagesInAcquisition; 0 if unknown.
        is_object: whether the series is one image that is complete alone.
        is_open: whether an association is open that has sent an image of the series.
        version: number of changes of the set of images.
        tries: failed predictions.
    """

    key: str
    state: str
    reason: str
    first_at: float
    last_at: float
    n_instances: int
    n_expected: int
    n_acquired: int
    is_object: bool
    is_open: bool
    version: int
    tries: int


@dataclass(frozen=True, kw_only=True)
class ClaimedSeries:
    """A series that a worker predicts.

    Attributes:
        key: key of the series.
        digests: digest of each image by its key.
        set_sha: digest of the set of images.
        tries: failed predictions so far.
    """

    key: str
    digests: Mapping[str, str]
    set_sha: str
    tries: int


def hash_set(digests: Mapping[str, str]) -> str:
    """Compute the digest of a set of images from the digest of each."""
    return hashlib.sha256("\n".join(sorted(f"{sop} {sha}" for sop, sha in digests.items())).encode()).hexdigest()


def make_key(uid: str) -> str:
    """Compute the name of an object or series in the spool: a keyed hash of its UID."""
    return make_pseudonym(uid, prefix="k", digits=32).removeprefix("k-")
