"""The picture of the own training images of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medim.training.engine.view_sheet import (
    TILE_PIXELS,
    VIEWS_FILE,
    colour_mask,
    cut_slice,
    largest_slice,
    write_view_sheet,
)
from medim.training.finetune.view_figure import draw_labelled_views
from medim.training.pretrain.view_figure import draw_views


class Images:
    """Data set of five noise images with two views, and with a mask in one slice."""

    def __init__(self, *, labelled: bool) -> None:
        self._labelled = labelled

    def __len__(self) -> int:
        return 5

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(item[1])
        if not self._labelled:
            return torch.rand(2, 1, 8, 8, 8, generator=generator), torch.zeros(2, 3)
        mask = torch.zeros(8, 8, 8, dtype=torch.int64)
        mask[1, 2:6, 2:6] = 1
        return torch.rand(1, 8, 8, 8, generator=generator), mask


class HidingObjective(torch.nn.Module):
    """Encodes the views with the first half hidden."""

    def forward(self, encode: Any, views: Any) -> dict[str, Any]:
        image = views.image.flatten(0, 1).clone()
        encode(views.image.flatten(0, 1))
        image[..., :4] = 0
        encode(image)
        torch.rand(1)  # must not change the random state of the run
        return {}


def test_the_views_of_a_run_are_drawn_with_hidden_parts_and_without_a_trace(tmp_path: Path) -> None:
    encoder = torch.nn.Conv3d(1, 1, 1)
    module: Any = torch.nn.Module()
    module.encoder, module.decoder = encoder, None
    module.objectives = torch.nn.ModuleDict({"hiding": HidingObjective()})
    state = torch.get_rng_state()
    draw_views(tmp_path, module, Images(labelled=False))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    picture = np.asarray(Image.open(tmp_path / VIEWS_FILE))
    assert picture.shape[0] > 5 * TILE_PIXELS, "one row per image"
    assert picture.shape[1] > 3 * TILE_PIXELS, "two views and the hidden parts"
    assert (picture[:16, :, 0] != picture[:16, :, 2]).any(), "the notice is red"


def test_a_mask_is_drawn_in_its_largest_slice(tmp_path: Path) -> None:
    draw_labelled_views(tmp_path, Images(labelled=True))  # type: ignore[arg-type]
    picture = np.asarray(Image.open(tmp_path / VIEWS_FILE)).astype(int)
    tile = picture[40 : 32 + TILE_PIXELS, 8 + TILE_PIXELS : 4 + 2 * TILE_PIXELS]
    coloured = (tile[..., 0] - tile[..., 2] > 40).mean()
    assert 0.15 < coloured < 0.4, "a quarter of the slice is foreground"


def test_a_flat_image_and_a_wide_one_are_drawn(tmp_path: Path) -> None:
    write_view_sheet(tmp_path / "x" / "views.png", ["view"], [[np.zeros((3, 300), np.float32)]])
    assert Image.open(tmp_path / "x" / "views.png").height > TILE_PIXELS
    assert cut_slice(np.ones((2, 3))).shape == (2, 3)
    assert largest_slice(np.ones((2, 3))) is None
    assert colour_mask(np.zeros((2, 2), np.float32), np.ones((2, 2))).max() > 0


class ClassImages(Images):
    """Images with a class."""

    def __init__(self) -> None:
        super().__init__(labelled=True)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(1, 8, 8), torch.tensor(1)


def test_a_class_has_no_mask_and_needs_none(tmp_path: Path) -> None:
    draw_labelled_views(tmp_path, ClassImages())  # type: ignore[arg-type]
    assert (tmp_path / VIEWS_FILE).is_file()
