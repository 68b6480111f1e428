"""The base of every record that stands in a contract: no unknown key, no change."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from medim.types import UserError

_S = TypeVar("_S", bound="StrictModel")


class StrictModel(BaseModel):
    """A record whose every key is known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_strict_json(path: Path, kind: type[_S], description: str) -> _S:
    """Read a JSON file that a user wrote.

    Args:
        path: the file.
        kind: what it should hold.
        description: the same in words.

    Raises:
        UserError: the file is missing or holds something else; the message names each key that is wrong.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: expected {description}, got '{error.strerror}'. Check the path.") from None
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: expected {description}, got {reasons}. Correct the file.") from None
