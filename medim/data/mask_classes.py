"""Classes of segmentation masks: their names, their values in files, and their consecutive numbers in training.

A class is a value that occurs in the masks of a source or that its `dataset.json` names: masks of 0 and 255 have one
class, masks of 0, 1 and 4 have two. Networks, stores and metrics use the class numbers 1, 2, ... in the order of the
values; files of predictions contain the values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from medim.types import IGNORE_INDEX, Array, UserError

MAX_CLASSES = IGNORE_INDEX - 1  # class numbers are uint8, and the highest one marks voxels without a label
MAX_MASK_VALUE = 65535  # of the masks that `read_mask` reads
_MAX_LISTED_VALUES = 12
_UNKNOWN = np.uint16(IGNORE_INDEX + 1)
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class MaskClasses:
    """Names of mask values.

    Attributes:
        names: names of the classes, without the background.
        values: their values in the mask files, ascending, all above 0.
        ignore_value: value of voxels that nobody has labelled, or None.
        regions: names of regions of nnU-Net, which are unions of several values.
    """

    names: tuple[str, ...] = ()
    values: tuple[int, ...] = ()
    ignore_value: int | None = None
    regions: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether any value has a name."""
        return bool(self.names)

    def find_unknown_values(self, values: Iterable[int]) -> list[int]:
        """List the values that are neither background, nor a class, nor ignored."""
        known_values = {0, *self.values, self.ignore_value}
        return [value for value in values if value not in known_values]


def name_values(values: Iterable[int]) -> MaskClasses:
    """Name the values of masks without a `dataset.json`.

    Raises:
        UserError: there are more values than class numbers.

    Examples:
        >>> name_values([0, 255]).names
        ('label-255',)
    """
    class_values = tuple(sorted({int(value) for value in values} - {0}))
    check_class_count("masks", class_values)
    return MaskClasses(names=tuple(map(_name_value, class_values)), values=class_values)


def match_class_names(
    names: Sequence[str], values: Sequence[int], known_names: Sequence[str], known_values: Sequence[int]
) -> tuple[str, ...]:
    """Match the classes of masks without names to those of a network by their values, and the other way round.

    Args:
        names: class names of the masks.
        values: their values; empty if they are 1, 2, ...
        known_names: class names of the network.
        known_values: their values; empty if they are 1, 2, ...

    Returns:
        `names`, in which a class of an equal value has the name of the network, if either side has no names. Of two
        single classes, the value 255 also matches 1, as in masks of annotation tools.

    Examples:
        >>> match_class_names(["label-1", "label-4"], [1, 4], ["core", "edema", "tumour"], [1, 2, 4])
        ('core', 'tumour')
        >>> match_class_names(["label-255"], [255], ["lesion"], [1])
        ('lesion',)
    """
    sides = [(names, values or range(1, len(names) + 1)), (known_names, known_values or range(1, len(known_names) + 1))]
    if not any(list(side_names) == [_name_value(v) for v in side_values] for side_names, side_values in sides):
        return tuple(names)
    if len(names) == len(known_names) == 1 and {*sides[0][1], *sides[1][1]} == {1, 255}:
        return tuple(known_names)
    names_by_value = dict(zip(sides[1][1], known_names, strict=True))
    return tuple(names_by_value.get(value, name) for name, value in zip(*sides[0], strict=True))


def _name_value(value: int) -> str:
    return f"label-{value}"


def check_class_count(place: str, values: Sequence[int]) -> None:
    """Check that there are not more classes than class numbers.

    Raises:
        UserError: there are.
    """
    if len(values) > MAX_CLASSES:
        raise UserError(
            f"{place}: expected up to {MAX_CLASSES} classes, got {len(values)} values from {min(values)} to "
            f"{max(values)}. A mask has one number per class; do not use probabilities or grey images as masks."
        )


def list_values(array: Array) -> tuple[int, ...]:
    """List the distinct values of a mask, ascending.

    Args:
        array: unsigned integers.
    """
    flat = array.reshape(-1)
    counts = np.zeros(MAX_MASK_VALUE + 1 if array.itemsize > 1 else 256, np.int64)
    for start in range(0, flat.size, _BLOCK_VALUES):  # bincount converts to int64
        counts += np.bincount(flat[start : start + _BLOCK_VALUES], minlength=len(counts))
    return tuple(int(value) for value in np.flatnonzero(counts))


def to_class_numbers(array: Array, values: Sequence[int], ignore_value: int | None = None) -> Array:
    """Convert the values of a mask file to class numbers.

    Args:
        array: values as in the file, unsigned integers.
        values: value of each class.
        ignore_value: value of voxels without a label.

    Returns:
        uint8: 0 for the background, the number of the class, or `IGNORE_INDEX` for voxels without a label.

    Raises:
        ValueError: a voxel has another value; the message lists these values.

    Examples:
        >>> to_class_numbers(np.array([0, 4, 1, 9], np.uint8), (1, 4), 9).tolist()
        [0, 2, 1, 255]
    """
    table = np.full(MAX_MASK_VALUE + 1 if array.itemsize > 1 else 256, _UNKNOWN)
    table[0] = 0
    table[list(values)] = np.arange(1, len(values) + 1)
    if ignore_value is not None:
        table[ignore_value] = IGNORE_INDEX
    unknown_values = [value for value in list_values(array) if table[value] == _UNKNOWN]
    if unknown_values:
        raise ValueError(format_values(unknown_values))
    return np.asarray(table.astype(np.uint8)[array])


def to_file_values(labels: Array, values: Sequence[int]) -> Array:
    """Convert class numbers to the values of mask files.

    Args:
        labels: uint8 class numbers, 0 for the background.
        values: value of each class; empty if they are the class numbers.

    Returns:
        uint8, or uint16 if a class has a value above 255.

    Examples:
        >>> to_file_values(np.array([0, 1, 2], np.uint8), (1, 2035)).tolist()
        [0, 1, 2035]
    """
    if is_identity(values):
        return labels
    return np.asarray(np.array([0, *values], np.uint8 if max(values) < 256 else np.uint16)[labels])


def is_identity(values: Sequence[int]) -> bool:
    """Whether the values of the classes are their numbers 1, 2, ...; also if there are none."""
    return tuple(values) == tuple(range(1, len(values) + 1))


def describe_classes(classes: MaskClasses) -> str:
    """Describe values and classes: `mask values 0, 1, 4: 2 classes (label-1, label-4)`."""
    names = ", ".join(classes.names[:_MAX_LISTED_VALUES]) + ", ..." * (len(classes.names) > _MAX_LISTED_VALUES)
    count = f"{len(classes.names)} class{'es' * (len(classes.names) != 1)}"
    ignored = "" if classes.ignore_value is None else f"; voxels of value {classes.ignore_value} are ignored"
    return f"mask values {format_values((0, *classes.values))}: {count} ({names}){ignored}"


def format_values(values: Sequence[int]) -> str:
    """Format mask values as a list, shortened if there are many."""
    listed = ", ".join(map(str, values[:_MAX_LISTED_VALUES]))
    return f"{listed}, ..., {values[-1]}" if len(values) > _MAX_LISTED_VALUES else listed
