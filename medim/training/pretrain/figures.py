"""Figures of a pretraining run without patient images: losses with chance levels, RankMe, and views of a phantom."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from medim.config import PretrainConfig
from medim.data.loading.augmentations import Augmentation
from medim.files import write_bytes

HistoryRow = tuple[int, str, float | None, float | None, float | None]
N_VIEWS = 6


def draw_training_figures(out: Path, rows: Sequence[HistoryRow]) -> list[Path]:
    """Draw the figures of a run into its folder `figures/`; earlier ones are replaced.

    Args:
        out: folder of the run.
        rows: rows of `history.csv`.

    Returns:
        Paths of the figures: `losses.svg` and, if it was measured, `rankme.svg`.
    """
    figures = {"losses.svg": _plot_losses(rows), "rankme.svg": _plot_rankme(rows)}
    return [_save_figure(figure, out / "figures" / name) for name, figure in figures.items() if figure is not None]


def draw_phantom_views(out: Path, config: PretrainConfig) -> Path:
    """Draw augmented views of a phantom into `figures/phantom.png` of a run, for the tracking server."""
    return _save_figure(_plot_views(config), out / "figures" / "phantom.png")


def _save_figure(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=100)
    write_bytes(path, content.getvalue())
    return path


def _plot_losses(rows: Sequence[HistoryRow]) -> Figure:
    """Plot training losses, validation losses and chance level, one panel per term."""
    names = list(dict.fromkeys(name for _, name, loss, chance, _ in rows if chance is not None or "/" not in name))
    names = [name for name in names if any(row[1] == name and row[2] is not None for row in rows)]
    figure = Figure(figsize=(6, 2.5 * max(1, len(names))), layout="constrained")
    for axes, name in zip(np.ravel(figure.subplots(max(1, len(names)), squeeze=False)), names, strict=False):
        term_rows = [row for row in rows if row[1] == name]
        axes.plot(
            *zip(*((step, loss) for step, _, loss, _, _ in term_rows if loss is not None), strict=True),
            label="training",
        )
        if held_out := [(step, value) for step, *_, value in term_rows if value is not None]:
            axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
        if (level := next((chance for *_, chance, _ in term_rows if chance is not None), None)) is not None:
            axes.axhline(level, color="grey", linestyle="--", label="chance")
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.legend()
    return figure


def _plot_rankme(rows: Sequence[HistoryRow]) -> Figure | None:
    """Plot the effective rank of the validation summaries by step."""
    points = [(step, value) for step, name, *_, value in rows if name == "rankme" and value is not None]
    if not points:
        return None
    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o-")
    axes.set(title="RankMe of the held-out summaries", xlabel="step", ylabel="effective rank")
    return figure


def _plot_views(config: PretrainConfig) -> Figure:
    """Plot views of a phantom, a ball in noise, because patient images must not be sent to a tracking server."""
    views: Any = config.views
    shape = tuple(views.shape)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    noise = np.random.default_rng(0).normal(0, 0.1, shape)
    ball = (np.linalg.norm(grid - 0.2, axis=0) < 0.5) + 0.5 * (np.linalg.norm(grid, axis=0) < 0.9)
    image = torch.from_numpy((ball + noise).astype(np.float32))[None]
    augment = Augmentation(views.augmentations, spatial_dims=len(shape))
    figure = Figure(figsize=(1.6 * N_VIEWS, 2.2), layout="constrained")
    figure.suptitle("Views of a synthetic phantom, augmented as in this run; the first is not augmented")
    for n, axes in enumerate(np.ravel(figure.subplots(1, N_VIEWS))):
        view = (augment(image, n)[0] if n else image).numpy()[0]
        axes.imshow(view if view.ndim == 2 else view[shape[0] // 2], cmap="gray")
        axes.set_axis_off()
    return figure
