"""Base class of the models in a contract: immutable and without unknown keys."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from medim.parsing import MAX_JSON_BYTES, parse_json, read_limited
from medim.types import UserError

_S = TypeVar("_S", bound="StrictModel")


class StrictModel(BaseModel):
    """Immutable pydantic model that rejects unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_strict_json(path: Path, kind: type[_S], description: str) -> _S:
    """Read and validate a JSON file that a user wrote.

    Args:
        path: JSON file.
        kind: model of the content.
        description: content of the file in words, for error messages.

    Raises:
        UserError: the file is missing or does not match the model; the message lists each invalid key.
    """
    try:
        return kind.model_validate(parse_json(read_limited(path, MAX_JSON_BYTES)))
    except OSError as error:
        raise UserError(f"{path}: expected {description}, got '{error.strerror}'. Check the path.") from None
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise UserError(f"{path}: expected {description}, got {reasons}. Correct the file.") from None
    except ValueError as error:
        raise UserError(f"{path}: expected {description} as JSON ({error}). Correct the file.") from None
