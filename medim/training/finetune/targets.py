"""Targets of fine-tuning (class indices, findings or masks), and the head for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from medim.config import FinetuneConfig
from medim.data.index.index import ImageRecord, Index
from medim.data.labels import check_label_kind, encode_findings
from medim.types import Array, UserError

log = logging.getLogger(__name__)
MULTI_LABEL = "multi_label"  # entry of HEADS for findings


def select_head(config: FinetuneConfig, index: Index) -> FinetuneConfig:
    """Select the head for the kind of labels: for findings, `multi_label` replaces `classification`.

    Returns:
        Configuration with the selected head.

    Raises:
        UserError: the head is `multi_label` and the labels are classes, or the labels are of both kinds.
    """
    if config.task != "classification":
        return config
    check_label_kind(record.label for record in index.records)
    name, findings = config.head.get("name"), index.findings
    if name == MULTI_LABEL and not findings:
        raise UserError(
            "head multi_label: expected findings as labels, got classes. Use --labels CSV with one column per "
            "finding (1, 0 or empty), or --set head.name=classification."
        )
    if name == "classification" and findings:
        log.info(
            "the labels are %d findings, several per image: using head %s instead of %s",
            len(findings),
            MULTI_LABEL,
            name,
        )
        return config.model_copy(update={"head": {**config.head, "name": MULTI_LABEL}})
    return config


def build_targets(config: FinetuneConfig, records: Sequence[ImageRecord], classes: Sequence[str]) -> Array | None:
    """Build the targets: (N,) class indices, (N, K) findings, or None if masks are the targets."""
    if config.task == "segmentation":
        return None
    if config.head["name"] == MULTI_LABEL:
        return np.array([encode_findings(record.label, classes) for record in records])
    return np.array([classes.index(str(record.label)) for record in records])


def build_blank_target(config: FinetuneConfig, count: int) -> torch.Tensor:
    """Build targets of `count` images of two classes, for a dry run."""
    if config.head.get("name") == MULTI_LABEL:
        return torch.zeros(count, 2)
    return torch.zeros((count, *config.views.shape) if config.task == "segmentation" else count, dtype=torch.int64)
