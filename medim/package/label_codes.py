"""Codes of the classes of a package for DICOM output; only published codes are allowed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer

from medim.config import suggest_name
from medim.package.schema import StrictModel, read_strict_json
from medim.tasks import map_tasks_by_kind
from medim.types import UserError

DicomText = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f\\]{1,64}$")]  # DICOM's LO: 64 characters, no backslash
ColourByte = Annotated[int, Field(ge=0, le=255)]


class ConceptCode(StrictModel):
    """Coded concept, as in DICOM's Code Sequence Macro."""

    value: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,16}$")]
    scheme: Literal["SCT", "DCM"]
    meaning: DicomText


class UnitCode(StrictModel):
    """Unit of a measurement, as a UCUM code."""

    value: Annotated[str, Field(pattern=r"^[!-~]{1,16}$")]
    meaning: DicomText


class LabelCode(StrictModel):
    """Codes of one class.

    A part without a code of its own has the code of its parent structure, and modifiers.
    """

    index: NonNegativeInt = Field(description="value in a mask, or index of the output of a classifier")
    name: DicomText = Field(description="name of the class")
    category: ConceptCode | None = Field(
        default=None, description="DICOM CID 7150, such as Anatomical Structure; for a segmenter"
    )
    type: ConceptCode | None = Field(default=None, description="structure or finding; for a segmenter")
    modifiers: tuple[ConceptCode, ...] = Field(default=(), description="DICOM CID 2, such as Anterior")
    laterality: Literal["left", "right", "both"] | None = Field(
        default=None, description="laterality, if it is the same in every image"
    )
    colour: tuple[ColourByte, ColourByte, ColourByte] | None = Field(default=None, description="red, green, blue")
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="for a multi-label classifier: smallest probability of a positive finding; default 0.5",
    )
    unit: UnitCode | None = Field(default=None, description="UCUM unit of a predicted number")

    @model_serializer(mode="wrap")
    def _omit_empty_unit(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        content: dict[str, object] = dump(self)
        return {key: value for key, value in content.items() if key != "unit" or value is not None}


class LabelCodesFile(StrictModel):
    """Content of the file of `--label-codes`."""

    schema_version: Literal[1] = 1
    labels: Annotated[tuple[LabelCode, ...], Field(min_length=1, max_length=255)]


def read_label_codes(
    schema: Path | str, classes: Sequence[str], kind: str, class_values: Sequence[int] = ()
) -> tuple[LabelCode, ...]:
    """Read label codes and check them against the classes of a run.

    Args:
        schema: JSON file, or name of a built-in one.
        classes: class names of the run. Case is ignored in the comparison; the spelling of the run is used.
        kind: kind of model.
        class_values: value of each class in mask files, which may stand for the index of the class.

    Raises:
        UserError: classes, indices or their order differ from those of the run, a segment has no codes, a threshold
            does not apply to the kind of model, or a code is not published with its meaning.
    """
    path = Path(schema)
    if not path.exists():
        builtin = list_builtin_labels()
        if str(schema) not in builtin:
            hint = suggest_name(str(schema), sorted(builtin))
            raise UserError(
                f"--label-codes {schema}: no such file.{hint} Shipped label codes: {', '.join(sorted(builtin))}."
            )
        path = builtin[str(schema)]
    labels = read_strict_json(path, LabelCodesFile, "label codes (docs/how-to/answer-in-dicom.md)").labels
    task = map_tasks_by_kind().get(kind)
    first_index = task.first_class_index if task else 0
    expected = list(enumerate(classes, start=first_index))
    names = [name.casefold() for name in classes]
    indices = range(first_index, first_index + len(classes)), class_values
    given_pairs = [(label.index, label.name.casefold()) for label in labels]
    if given_pairs not in [list(zip(numbers, names, strict=False)) for numbers in indices]:
        raise UserError(
            f"{schema}: expected the classes {expected} of the run, in this order, got "
            f"{[(label.index, label.name) for label in labels]}. Write one label per class."
        )
    for label in labels:
        if task and task.dense and not (label.category and label.type):
            raise UserError(f"{schema}, {label.name}: a DICOM segment requires `category` and `type`. Add them.")
        if not (task and task.has_thresholds) and label.threshold is not None:
            raise UserError(f"{schema}, {label.name}: `threshold` applies only to a multi-label classifier. Remove it.")
        if not (task and task.quantity == "value") and label.unit is not None:
            raise UserError(f"{schema}, {label.name}: `unit` applies only to a regressor. Remove it.")
        for code in filter(None, (label.category, label.type, *label.modifiers)):
            _check_concept_code(code, f"{schema}, {label.name}")
    return tuple(
        label.model_copy(update={"index": index, "name": name})
        for label, (index, name) in zip(labels, expected, strict=True)
    )


def list_builtin_labels() -> dict[str, Path]:
    """List the built-in label code files by name."""
    package_folder = Path(__file__).resolve().parents[1]
    folders = (package_folder / "configs" / "labels", package_folder.parent / "configs" / "labels")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.json"))}


def _check_concept_code(code: ConceptCode, source: str) -> None:
    """Check a code against the DICOM dictionary.

    Raises:
        UserError: the code is not in the dictionary or has another meaning there.
    """
    meanings = _load_code_meanings(code.scheme).get(code.value)
    if meanings is None:
        raise UserError(
            f"{source}: {code.scheme} {code.value} ({code.meaning}) is not a code of DICOM PS3.16 in "
            "pydicom. If a part has no code there, use the code of its parent structure and `modifiers`."
        )
    if code.meaning.casefold() not in {meaning.casefold() for meaning in meanings}:
        raise UserError(
            f"{source}: {code.scheme} {code.value} is {' or '.join(map(repr, sorted(meanings)))}, not "
            f"{code.meaning!r}. Correct the value or the meaning."
        )


@functools.cache
def _load_code_meanings(scheme: str) -> dict[str, set[str]]:
    """Load the meanings, by code value, that DICOM publishes in a coding scheme."""
    from pydicom.sr.codedict import codes  # 11,000 entries that only an export needs

    dictionary = getattr(codes, scheme)
    meanings: dict[str, set[str]] = {}
    for keyword in dictionary.dir():
        code = getattr(dictionary, keyword)
        meanings.setdefault(code.value, set()).add(code.meaning)
    return meanings
