"""What the classes of a package are in the words of a PACS: published codes, and none of our own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt

from medim.inference.network import Kind
from medim.package.schema import Strict, read_strict
from medim.types import UserError

Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f\\]{1,64}$")]  # DICOM's LO: 64 letters, no backslash
Byte = Annotated[int, Field(ge=0, le=255)]


class Code(Strict):
    """A coded concept, as in DICOM's Code Sequence Macro."""

    value: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,16}$")]
    scheme: Literal["SCT", "DCM"]
    meaning: Text


class Label(Strict):
    """What one class is.

    A part without a code of its own has the code of the structure it is a part of, and modifiers.
    """

    index: NonNegativeInt = Field(description="the value in a mask, or the place among a classifier's outputs")
    name: Text = Field(description="of the class")
    category: Code | None = Field(
        default=None, description="DICOM CID 7150, such as Anatomical Structure; of a segmenter"
    )
    type: Code | None = Field(default=None, description="the structure or finding; of a segmenter")
    modifiers: tuple[Code, ...] = Field(default=(), description="DICOM CID 2, such as Anterior")
    laterality: Literal["left", "right", "both"] | None = Field(
        default=None, description="where every image has this side"
    )
    colour: tuple[Byte, Byte, Byte] | None = Field(default=None, description="red, green, blue")
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="of a multi-label classifier: the probability from which a finding is called; default 0.5",
    )


class LabelsSchema(Strict):
    """The file of `--labels-schema`."""

    schema_version: Literal[1] = 1
    labels: Annotated[tuple[Label, ...], Field(min_length=1, max_length=255)]


def read_labels(schema: Path | str, classes: Sequence[str], kind: Kind) -> tuple[Label, ...]:
    """Read label codes and hold them against the classes of a run.

    Args:
        schema: a JSON file, or the name of a shipped one.
        classes: of the run; names agree but for case, and the run's spelling stays.
        kind: of the run.

    Raises:
        UserError: another class, index or order than the run's, a segment without codes, a threshold that means
            nothing, or a code that is not published under that meaning.
    """
    path = Path(schema)
    if not path.exists():
        path = shipped().get(str(schema), path)
    found = read_strict(path, LabelsSchema, "label codes (docs/how-to/answer-in-dicom.md)").labels
    want = list(enumerate(classes, start=1 if kind == "segmenter" else 0))
    if [(label.index, label.name.casefold()) for label in found] != [(i, name.casefold()) for i, name in want]:
        raise UserError(
            f"{schema}: expected the classes {want} of the run, in this order, got "
            f"{[(label.index, label.name) for label in found]}. Write one label a class."
        )
    for label in found:
        if kind == "segmenter" and not (label.category and label.type):
            raise UserError(f"{schema}, {label.name}: expected `category` and `type`, which a DICOM segment must have.")
        if kind != "multi_label_classifier" and label.threshold is not None:
            raise UserError(f"{schema}, {label.name}: `threshold` is of a multi-label classifier. Leave it out.")
        for code in filter(None, (label.category, label.type, *label.modifiers)):
            _check(code, f"{schema}, {label.name}")
    return tuple(label.model_copy(update={"name": name}) for label, name in zip(found, classes, strict=True))


def shipped() -> dict[str, Path]:
    """The label codes that come with medim, by name."""
    here = Path(__file__).resolve().parents[1]
    folders = (here / "configs" / "labels", here.parent / "configs" / "labels")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def _check(code: Code, where: str) -> None:
    """Refuse a code that DICOM's dictionary does not have, or has for something else.

    Raises:
        UserError: in that case.
    """
    meanings = _published(code.scheme).get(code.value)
    if meanings is None:
        raise UserError(
            f"{where}: {code.scheme} {code.value} ({code.meaning}) is not among the codes that DICOM PS3.16 publishes, "
            "as pydicom has them. Where a part has no code there, use its parent structure's and `modifiers`."
        )
    if code.meaning.casefold() not in {meaning.casefold() for meaning in meanings}:
        raise UserError(
            f"{where}: {code.scheme} {code.value} is {' or '.join(map(repr, sorted(meanings)))}, not "
            f"{code.meaning!r}. Correct the value or the meaning."
        )


@functools.cache
def _published(scheme: str) -> dict[str, set[str]]:
    """Meanings by value of the codes that DICOM publishes in a scheme."""
    from pydicom.sr.codedict import codes  # 11,000 entries, which only an export needs

    dictionary = getattr(codes, scheme)
    found: dict[str, set[str]] = {}
    for keyword in dictionary.dir():
        code = getattr(dictionary, keyword)
        found.setdefault(code.value, set()).add(code.meaning)
    return found
