"""Picture of training images in the folder of a run: `figures/views.png`, which is never sent to a tracking server."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medim.files import write_bytes
from medim.types import Array

VIEWS_FILE = Path("figures") / "views.png"
SITE_NOTICE = "Patient images: keep this file on site"
N_ROWS = 6
TILE_PIXELS, MARGIN_PIXELS, LINE_PIXELS = 128, 4, 16  # pixels
MASK_COLOUR = np.array([255, 140, 0])


def write_view_sheet(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Array]]) -> None:
    """Write a picture with a row per training image and a column per view of it.

    Args:
        path: path of the PNG.
        columns: title of each column.
        rows: grey values (H, W), or colours (H, W, 3) uint8, by image and column.
    """
    width = MARGIN_PIXELS + len(columns) * (TILE_PIXELS + MARGIN_PIXELS)
    font = ImageFont.load_default()
    width = max(width, int(font.getlength(SITE_NOTICE)) + 2 * MARGIN_PIXELS)
    sheet = Image.new("RGB", (width, 2 * LINE_PIXELS + len(rows) * (TILE_PIXELS + MARGIN_PIXELS)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN_PIXELS, 0), SITE_NOTICE, fill="red", font=font)
    for column, title in enumerate(columns):
        left = MARGIN_PIXELS + column * (TILE_PIXELS + MARGIN_PIXELS)
        draw.text((left, LINE_PIXELS), title, fill="black", font=font)
        for row, tiles in enumerate(rows):
            tile = Image.fromarray(_as_colours(tiles[column]))
            tile.thumbnail((TILE_PIXELS, TILE_PIXELS)) if max(tile.size) > TILE_PIXELS else None
            scale = TILE_PIXELS / max(tile.size)
            tile = tile.resize(
                (max(1, round(tile.width * scale)), max(1, round(tile.height * scale))), Image.Resampling.NEAREST
            )
            sheet.paste(tile, (left, 2 * LINE_PIXELS + row * (TILE_PIXELS + MARGIN_PIXELS)))
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content.getvalue())


def cut_slice(array: Array, position: int | None = None) -> Array:
    """Cut the middle slice of the first axis of a 3D array (D, H, W), or another one; a 2D array is unchanged."""
    if array.ndim == 2:
        return array
    return np.asarray(array[array.shape[0] // 2 if position is None else position])


def largest_slice(mask: Array) -> int | None:
    """Position of the slice with most foreground in a 3D mask (D, H, W); None for a 2D mask."""
    return None if mask.ndim == 2 else int(np.argmax((mask > 0).sum(axis=(1, 2))))


def colour_mask(image: Array, mask: Array) -> Array:
    """Colour the foreground of a mask (H, W) in an image of grey values (H, W)."""
    colours = _as_colours(image).astype(np.float32)
    inside = mask > 0
    colours[inside] = 0.6 * colours[inside] + 0.4 * MASK_COLOUR
    return colours.astype(np.uint8)


def _as_colours(tile: Array) -> Array:
    if tile.ndim == 3:
        return tile
    low, high = float(tile.min()), float(tile.max())
    grey = ((tile - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)
