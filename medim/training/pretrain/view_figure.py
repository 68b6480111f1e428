"""Sample views of a pretraining run: its own images as the encoder receives them, with hidden parts."""

from __future__ import annotations

from pathlib import Path

import torch

from medim.data.loading.datasets import ViewDataset
from medim.training.engine.view_sheet import N_ROWS, VIEWS_FILE, cut_slice, write_view_sheet
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Array, Features, Views


class _RecordingEncoder(StepEncoder):
    """Step encoder that records the images it encodes."""

    def __init__(self, module: PretrainModule, views: Views) -> None:
        super().__init__(module.encoder, module.decoder, views, torch.Generator().manual_seed(0))
        self.images: list[torch.Tensor] = []

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode images (N, C, ...), and record them."""
        self.images.append(image)
        return super().__call__(image)


def draw_views(out: Path, module: PretrainModule, dataset: ViewDataset) -> None:
    """Draw views of training images, and the same views with hidden parts, into `figures/views.png` of a run.

    Args:
        out: folder of the run.
        module: module with the networks and objectives; not changed.
        dataset: views of the training images.
    """
    count = min(N_ROWS, len(dataset))
    images, starts = zip(*(dataset[i * len(dataset) // count, i] for i in range(count)), strict=True)
    views = Views(torch.stack(images), torch.stack(starts))
    n_views = views.image.shape[1]
    columns = {f"view {n + 1}": _list_slices(views.image[:, n]) for n in range(n_views)}
    for name, inputs in _record_inputs(module, views).items():
        columns[f"hidden: {name}"] = _list_slices(inputs[::n_views])
    write_view_sheet(out / VIEWS_FILE, list(columns), list(zip(*columns.values(), strict=True)))


def _list_slices(images: torch.Tensor) -> list[Array]:
    """List the middle slice of the first channel of images (N, C, ...)."""
    return [cut_slice(image[0].cpu().numpy()) for image in images]


def _record_inputs(module: PretrainModule, views: Views) -> dict[str, torch.Tensor]:
    """Record the inputs of the encoder that differ from the views, by objective."""
    device = next(module.encoder.parameters()).device
    views = Views(views.image.to(device), views.location.to(device))
    clean, training = views.image.flatten(0, 1), module.training
    inputs: dict[str, torch.Tensor] = {}
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            for name, objective in module.objectives.items():
                encode = _RecordingEncoder(module, views)
                objective(encode, views)
                changed = [image for image in encode.images if image.shape == clean.shape and not image.equal(clean)]
                inputs |= {name: changed[0]} if changed else {}
    finally:
        module.train(training)
    return inputs
