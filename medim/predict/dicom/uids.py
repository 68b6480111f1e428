"""UIDs of the objects that a prediction creates: random, or derived from a seed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count

import highdicom

_NAMESPACE = uuid.UUID("0f5e5e1c-4d0d-5d1f-9b53-7d2b9c0a6c11")
_DERIVED_UIDS: ContextVar[Iterator[str] | None] = ContextVar("derived_uids", default=None)


def create_uid() -> highdicom.UID:
    """Create a UID: random, or the next one of the seed inside `deterministic_uids`."""
    derived = _DERIVED_UIDS.get()
    return highdicom.UID() if derived is None else highdicom.UID(next(derived))


@contextmanager
def deterministic_uids(seed: str) -> Iterator[None]:
    """Derive all UIDs of the block from a seed, so that a repeated prediction creates objects with the same UIDs.

    The UIDs are version 5 UUIDs under the root 2.25 (PS3.5 B.2).

    Args:
        seed: identifier of the images and of the package.

    Examples:
        >>> with deterministic_uids("a"):
        ...     first = create_uid()
        >>> with deterministic_uids("a"):
        ...     first == create_uid()
        True
    """
    token = _DERIVED_UIDS.set(f"2.25.{uuid.uuid5(_NAMESPACE, f'{seed}/{number}').int}" for number in count())
    try:
        yield
    finally:
        _DERIVED_UIDS.reset(token)
