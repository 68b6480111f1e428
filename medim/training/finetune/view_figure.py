"""Sample views of a fine-tuning run: its own training images, with their masks."""

from __future__ import annotations

from pathlib import Path

from medim.data.loading.datasets import LabelledDataset
from medim.training.engine.view_sheet import (
    N_ROWS,
    VIEWS_FILE,
    colour_mask,
    cut_slice,
    largest_slice,
    write_view_sheet,
)
from medim.types import Array


def draw_labelled_views(out: Path, dataset: LabelledDataset) -> None:
    """Draw views of training images, and the same views with their masks, into `figures/views.png` of a run.

    Args:
        out: folder of the run.
        dataset: labelled training images; only masks are drawn, no classes.
    """
    count = min(N_ROWS, len(dataset))
    rows: list[list[Array]] = []
    for i in range(count):
        image, target = dataset[i * len(dataset) // count, i]
        has_mask = target.shape == image.shape[1:]
        position = largest_slice(target.numpy()) if has_mask else None
        view = cut_slice(image[0].numpy(), position)
        rows.append([view, colour_mask(view, cut_slice(target.numpy(), position))] if has_mask else [view])
    write_view_sheet(out / VIEWS_FILE, ["view", "mask"][: len(rows[0])], rows)
