"""Training data sets: unlabelled views, and labelled images, cropped from a store.

An item is requested as `(i, seed)` and depends on nothing else, so any batch can be reproduced. The number of loading
processes and a resumed run do not change a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from medim.data.loading.augmentations import Augmentation
from medim.data.loading.foreground import ForegroundVoxels
from medim.data.loading.store import Box, Store
from medim.types import Array, Step, UserError

CACHE_BYTES = 1 << 30
FOREGROUND_STREAM = 1  # separates the generator of foreground crops from that of all other choices of an item
ItemRequest = tuple[int, int]


class ViewDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random views of preprocessed images.

    Along axes in which the image is larger than the view, the position is random; along the others the image is
    centred and padded with its minimum.

    Args:
        store: store of the images.
        keys: store keys, one per image.
        shape: spatial shape of a view, in voxels.
        count: views per image, V.
        same_crop: crop all views of an image at the same position, so that they differ only in augmentation.
        augmentations: see `medim.data.loading.augmentations.AUGMENTATIONS`; drawn anew for each view.
        cache_bytes: memory for cached images, per loading process.

    Raises:
        UsageError: an augmentation is invalid.
        UserError: there are no images, or an image does not have the dimensions of `shape`.
    """

    def __init__(
        self,
        store: Store,
        keys: Sequence[str],
        *,
        shape: tuple[int, ...],
        count: int = 1,
        same_crop: bool = False,
        augmentations: Sequence[Step] = (),
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._images = _ImageBoxes(store, keys, tuple(shape), cache_bytes)
        self._count, self._same_crop = count, same_crop
        self._augment = Augmentation(augmentations, spatial_dims=len(shape))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images.keys)

    def __getitem__(self, item: ItemRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views of image `i`, with all random choices derived from `seed`.

        Returns:
            Image (V, C, *shape) float32, and location (V, dims) float32: index of the view's first voxel in the
            preprocessed image, in voxels (negative in padding).
        """
        i, seed = item
        rng = np.random.default_rng(seed)
        views, starts = [], []
        start = self._images.draw_start(i, rng)
        for view in range(self._count):
            if view and not self._same_crop:
                start = self._images.draw_start(i, rng)
            image = torch.from_numpy(self._images.cut_box(i, start))
            views.append(self._augment(image, int(rng.integers(1 << 32)))[0])
            starts.append(start)
        return torch.stack(views), torch.tensor(starts, dtype=torch.float32)


class LabelledDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images with their targets: class indices, other numbers, or the masks in the store.

    Args:
        store: store of the images.
        keys: store keys, one per image.
        targets: one per image: (N,) class indices, or (N, K) numbers; None for segmentation (stored masks).
        shape: spatial shape of an item, cropped and padded as in `ViewDataset` (masks with 0).
        augmentations: geometric ones transform image and mask together (linear and nearest interpolation).
        foreground_share: probability that a crop is centred on a foreground voxel, as far as the border of the image
            permits; the other crops are those of 0. Images without foreground, and those not larger than the crop,
            keep their crops. Needs masks as targets.
        cache_bytes: memory for cached images and masks, per loading process.

    Raises:
        UsageError: an augmentation is invalid.
        UserError: targets do not match keys, or an image has no mask.
    """

    def __init__(
        self,
        store: Store,
        keys: Sequence[str],
        targets: Array | None = None,
        *,
        shape: tuple[int, ...],
        augmentations: Sequence[Step] = (),
        foreground_share: float = 0.0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if targets is not None and foreground_share:
            raise ValueError("foreground_share: expected masks as targets.")
        if targets is not None and len(targets) != len(keys):
            raise UserError(f"targets: expected one per image ({len(keys)}), got {len(targets)}.")
        keys_without_mask = [key for key in keys if targets is None and not store.get_entry(key).has_mask]
        if keys_without_mask:
            raise UserError(
                f"{store.folder}: {len(keys_without_mask)} of {len(keys)} images have no mask (first: "
                f"{keys_without_mask[0]})."
            )
        self._images = _ImageBoxes(store, keys, tuple(shape), cache_bytes)
        kind = None if targets is not None and np.ndim(targets) == 2 else np.int64
        self._targets = None if targets is None else torch.from_numpy(np.asarray(targets, kind))
        self._augment = Augmentation(augmentations, spatial_dims=len(shape))
        self._foreground_share = foreground_share

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images.keys)

    def __getitem__(self, item: ItemRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image `i` with its target, with all random choices derived from `seed`.

        Returns:
            Image (C, *shape) float32, and target: int64 () or (*shape), or float (K,) of the type of `targets`.
        """
        i, seed = item
        rng = np.random.default_rng(seed)
        start = self._images.draw_start(i, rng)
        if self._foreground_share:
            foreground_rng = np.random.default_rng((seed, FOREGROUND_STREAM))
            if foreground_rng.random() < self._foreground_share:
                start = self._images.centre_on_foreground(i, start, foreground_rng)
        image = torch.from_numpy(self._images.cut_box(i, start))
        augmentation_seed = int(rng.integers(1 << 32))
        if self._targets is not None:
            return self._augment(image, augmentation_seed)[0], self._targets[i]
        mask = torch.from_numpy(self._images.cut_box(i, start, mask=True))
        image, mask = self._augment(image, augmentation_seed, mask)
        return image, mask[0].to(torch.int64)


class _ImageBoxes:
    """Boxes of stored images. Images are cached in memory in order of access until the limit is reached."""

    def __init__(self, store: Store, keys: Sequence[str], shape: tuple[int, ...], cache_bytes: int) -> None:
        if not keys:
            raise UserError(f"{store.folder}: expected at least one image to read, got none.")
        self.keys, self._store, self._shape, self._cache_bytes = list(keys), store, shape, cache_bytes
        self._cache: dict[tuple[str, bool], Array] = {}
        self._room = cache_bytes
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._foreground: dict[str, ForegroundVoxels] = {}
        for key in self.keys[:1]:
            self._get_size(key)

    def __getstate__(self) -> dict[str, object]:
        """Give each loading process an empty cache of its own."""
        return {**self.__dict__, "_cache": {}, "_foreground": {}, "_room": self._cache_bytes}

    def draw_start(self, i: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw the start of a box: random along axes larger than the box, centred along smaller ones."""
        size = self._get_size(self.keys[i])
        return tuple(
            int(rng.integers(n - w + 1)) if n > w else -((w - n) // 2) for n, w in zip(size, self._shape, strict=True)
        )

    def centre_on_foreground(self, i: int, start: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        """Draw the start of a box around a foreground voxel; a box that crosses a border is moved into the image.

        Args:
            i: number of the image.
            start: start of a box, which is kept along axes not larger than the box, and without foreground.
            rng: source of the class and of the voxel.
        """
        size = self._get_size(self.keys[i])
        if all(n <= w for n, w in zip(size, self._shape, strict=True)):
            return start
        voxel = self._get_foreground(self.keys[i]).draw_voxel(rng)
        if voxel is None:
            return start
        return tuple(
            min(max(v - w // 2, 0), n - w) if n > w else p
            for v, w, n, p in zip(voxel, self._shape, size, start, strict=True)
        )

    def cut_box(self, i: int, start: tuple[int, ...], *, mask: bool = False) -> Array:
        """Copy the box of an image (float32) or a mask (uint8) that begins at `start`."""
        key = self.keys[i]
        size = self._get_size(key)
        source_box = tuple(slice(max(p, 0), min(p + w, n)) for p, w, n in zip(start, self._shape, size, strict=True))
        box = self._read_box(key, mask, source_box)
        kind = np.uint8 if mask else np.float32
        if box.shape[1:] == self._shape:
            return np.array(box, dtype=kind, order="C")
        out = np.zeros((len(box), *self._shape), kind)
        if not mask:
            out[:] = np.reshape(self._store.get_entry(key).minimum, (-1, *[1] * len(size)))
        target_box = tuple(slice(s.start - p, s.stop - p) for s, p in zip(source_box, start, strict=True))
        out[(slice(None), *target_box)] = box
        return out

    def _get_size(self, key: str) -> tuple[int, ...]:
        size = self._sizes.get(key)
        if size is None:
            size = self._store.get_entry(key).shape
            if len(size) != len(self._shape):
                raise UserError(
                    f"views.shape: expected {len(size)} numbers for a {len(size)}D image, got {self._shape}."
                )
            self._sizes[key] = size
        return size

    def _get_foreground(self, key: str) -> ForegroundVoxels:
        foreground = self._foreground.get(key)
        if foreground is None:
            foreground = self._store.read_foreground(key)
            if foreground.indices.nbytes <= self._room:
                self._foreground[key] = foreground
                self._room -= foreground.indices.nbytes
        return foreground

    def _read_box(self, key: str, mask: bool, box: Box) -> Array:
        load: Callable[..., Array] = self._store.read_mask if mask else self._store.read_image
        array = self._cache.get((key, mask))
        if array is None:
            entry = self._store.get_entry(key)
            n_bytes = int(np.prod(entry.shape)) if mask else entry.nbytes
            if n_bytes > self._room:
                return load(key, box)
            array = self._cache[key, mask] = load(key)
            self._room -= n_bytes
        return array[(slice(None), *box)]
