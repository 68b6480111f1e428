"""Names of the classes in the archives of MedMNIST, from `INFO` in medmnist 3.0.2."""

from __future__ import annotations

import re

CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "chestmnist": (
        "atelectasis",
        "cardiomegaly",
        "effusion",
        "infiltration",
        "mass",
        "nodule",
        "pneumonia",
        "pneumothorax",
        "consolidation",
        "edema",
        "emphysema",
        "fibrosis",
        "pleural",
        "hernia",
    ),
    "pneumoniamnist": ("normal", "pneumonia"),
}


def find_class_names(stem: str) -> tuple[str, ...] | None:
    """Find the class names of an archive by its publisher's file name; None for other archives.

    Examples:
        >>> find_class_names("pneumoniamnist_224"), find_class_names("pictures")
        (('normal', 'pneumonia'), None)
    """
    return CLASS_NAMES.get(re.sub(r"_(64|128|224)$", "", stem))
