"""What training reads: views without labels, and images with them, cut from a store.

An item is asked for by `(i, seed)` and depends on nothing else, so any batch can be replayed: neither the number of
loading processes nor a resumed run changes a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from medim.data.loading.augmentations import Augmentation
from medim.data.loading.store import Box, Store
from medim.types import Array, Step, UserError

CACHE_BYTES = 1 << 30
Item = tuple[int, int]


class ViewDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random views of preprocessed images.

    A view lies at a random place along axes where the image is larger than the view; along the others the image is
    centred and padded with its minimum.

    Args:
        store: where the images are.
        keys: the store keys, one an image.
        shape: spatial shape of a view, in voxels.
        count: views an image, V.
        same_place: cut all views of an image at one place; they differ by augmentation only.
        augmentations: see `medim.data.loading.augmentations.AUGMENTATIONS`; drawn anew for each view.
        cache_bytes: RAM for images that were read, in each loading process.

    Raises:
        UsageError: an augmentation is wrong.
        UserError: there are no images, or an image has not the dimensions of `shape`.
    """

    def __init__(
        self,
        store: Store,
        keys: Sequence[str],
        *,
        shape: tuple[int, ...],
        count: int = 1,
        same_place: bool = False,
        augmentations: Sequence[Step] = (),
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._images = _Images(store, keys, tuple(shape), cache_bytes)
        self._count, self._same_place = count, same_place
        self._augment = Augmentation(augmentations, spatial_dims=len(shape))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images.keys)

    def __getitem__(self, item: Item) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of image `i`, all their randomness drawn from `seed`.

        Returns:
            Image (V, C, *shape) float32, and location (V, dims) float32: where the view's first voxel lies in the
            preprocessed image, in voxels (below 0 where padded).
        """
        i, seed = item
        rng = np.random.default_rng(seed)
        views, places = [], []
        place = self._images.place(i, rng)
        for view in range(self._count):
            if view and not self._same_place:
                place = self._images.place(i, rng)
            image = torch.from_numpy(self._images.cut(i, place))
            views.append(self._augment(image, int(rng.integers(1 << 32)))[0])
            places.append(place)
        return torch.stack(views), torch.tensor(places, dtype=torch.float32)


class LabelledDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images with their targets: a class index each, or the mask in the store.

    Args:
        store: where the images are.
        keys: the store keys, one an image.
        targets: of each image: (N,) class indices, or (N, K) numbers; None for segmentation: the stored masks.
        shape: spatial shape of an item, cut and padded as in `ViewDataset` (masks with 0).
        augmentations: geometric ones move image and mask alike (linear and nearest interpolation).
        cache_bytes: RAM for images and masks that were read, in each loading process.

    Raises:
        UsageError: an augmentation is wrong.
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
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if targets is not None and len(targets) != len(keys):
            raise UserError(f"targets: expected one for each of {len(keys)} images, got {len(targets)}.")
        without = [key for key in keys if targets is None and not store.entry(key).mask]
        if without:
            raise UserError(f"{store.folder}: {len(without)} of {len(keys)} images have no mask (first: {without[0]}).")
        self._images = _Images(store, keys, tuple(shape), cache_bytes)
        kind = np.float32 if targets is not None and np.ndim(targets) == 2 else np.int64
        self._targets = None if targets is None else torch.from_numpy(np.asarray(targets, kind))
        self._augment = Augmentation(augmentations, spatial_dims=len(shape))

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images.keys)

    def __getitem__(self, item: Item) -> tuple[torch.Tensor, torch.Tensor]:
        """Image `i` with its target, all randomness drawn from `seed`.

        Returns:
            Image (C, *shape) float32, and target: int64 () or (*shape), or float32 (K,).
        """
        i, seed = item
        rng = np.random.default_rng(seed)
        place = self._images.place(i, rng)
        image = torch.from_numpy(self._images.cut(i, place))
        draw = int(rng.integers(1 << 32))
        if self._targets is not None:
            return self._augment(image, draw)[0], self._targets[i]
        mask = torch.from_numpy(self._images.cut(i, place, mask=True))
        image, mask = self._augment(image, draw, mask)
        return image, mask[0].to(torch.int64)


class _Images:
    """Boxes of stored images, from RAM where they fit into the bytes allowed (first come, kept to the end)."""

    def __init__(self, store: Store, keys: Sequence[str], shape: tuple[int, ...], cache_bytes: int) -> None:
        if not keys:
            raise UserError(f"{store.folder}: expected at least one image to read, got none.")
        self.keys, self._store, self._shape, self._bytes = list(keys), store, shape, cache_bytes
        self._cache: dict[tuple[str, bool], Array] = {}
        self._room = cache_bytes
        self._sizes: dict[str, tuple[int, ...]] = {}
        for key in self.keys[:1]:
            self._size(key)

    def __getstate__(self) -> dict[str, object]:
        """A loading process starts with an empty cache of its own."""
        return {**self.__dict__, "_cache": {}, "_room": self._bytes}

    def place(self, i: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Where a box starts: anywhere along larger axes, around the centre of smaller ones."""
        size = self._size(self.keys[i])
        return tuple(
            int(rng.integers(n - w + 1)) if n > w else -((w - n) // 2) for n, w in zip(size, self._shape, strict=True)
        )

    def cut(self, i: int, place: tuple[int, ...], *, mask: bool = False) -> Array:
        """The box of image (float32) or mask (uint8) that starts at `place`; a new array."""
        key = self.keys[i]
        size = self._size(key)
        inside = tuple(slice(max(p, 0), min(p + w, n)) for p, w, n in zip(place, self._shape, size, strict=True))
        box = self._box(key, mask, inside)
        kind = np.uint8 if mask else np.float32
        if box.shape[1:] == self._shape:
            return np.array(box, dtype=kind, order="C")
        out = np.zeros((len(box), *self._shape), kind)
        if not mask:
            out[:] = np.reshape(self._store.entry(key).minimum, (-1, *[1] * len(size)))
        put = tuple(slice(s.start - p, s.stop - p) for s, p in zip(inside, place, strict=True))
        out[(slice(None), *put)] = box
        return out

    def _size(self, key: str) -> tuple[int, ...]:
        size = self._sizes.get(key)
        if size is None:
            size = self._store.entry(key).shape
            if len(size) != len(self._shape):
                raise UserError(
                    f"views.shape: expected {len(size)} numbers for a {len(size)}D image, got {self._shape}."
                )
            self._sizes[key] = size
        return size

    def _box(self, key: str, mask: bool, inside: Box) -> Array:
        read: Callable[..., Array] = self._store.mask if mask else self._store.image
        whole = self._cache.get((key, mask))
        if whole is None:
            entry = self._store.entry(key)
            needed = int(np.prod(entry.shape)) if mask else entry.nbytes
            if needed > self._room:
                return read(key, inside)
            whole = self._cache[key, mask] = read(key)
            self._room -= needed
        return whole[(slice(None), *inside)]
