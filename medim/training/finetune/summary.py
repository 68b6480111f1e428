"""Content of `summary.json` of a fine-tuning run."""

from __future__ import annotations

from typing import TypedDict

from medim.data.contamination import ContaminationCounts
from medim.evaluation.cases import CaseSummary


class TrainingLoss(TypedDict):
    """First and last training loss."""

    first: float
    last: float


class ClassCounts(TypedDict):
    """Number of images with a class."""

    train: int
    val: int


class FinetuneSummary(TypedDict):
    """Content of `summary.json`.

    Attributes:
        class_images: number of training and of validation images with each class; empty if targets are no classes.
        class_weights: weights of the classes in the loss, by name; None if the head has none.
        val: evaluation on the validation split; None if the split is empty.
        lost_classes: fraction of the labels that the model finds, by class, if it is below a tenth; see
            `medim.training.finetune.lost_classes`.
    """

    schema_version: int
    command: str
    task: str
    init: str
    n_labelled: int
    n_selection_labels: int
    class_images: dict[str, ClassCounts]
    class_weights: dict[str, float] | None
    n_unlabelled: int
    steps: int
    resumed_from_steps: list[int]
    loss: TrainingLoss
    val: CaseSummary | None
    lost_classes: dict[str, float]
    peak_memory_bytes: int
    device: str
    precision: str
    config_hash: str
    index_hash: str
    where: str | None
    versions: dict[str, str]
    corrupt_checkpoints: list[str]
    train_val_duplicates: dict[str, int]
    contamination: ContaminationCounts | None
    seconds: float
