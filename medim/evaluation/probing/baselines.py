"""What a pretrained encoder is held against: its own architecture untrained, and the pixels themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import nn

from medim.data.preprocessing.steps import pad_or_crop, resize
from medim.metrics.representation import batch_images
from medim.model_spec import NetworkSpec
from medim.models.model import build_encoder
from medim.types import Array, Volume

MAX_COMPONENTS = 64
MAX_PIXELS = 1 << 16  # an image is scaled to at most this many before its components are taken


def build_random_encoder(spec: NetworkSpec, images: Iterable[Volume], *, seed: int, device: str = "cpu") -> nn.Module:
    """An untrained encoder, in evaluation mode, whose batch normalisation knows the images.

    With the running statistics that a network is born with, its features would hardly differ between images, and the
    pretrained encoder would have an easy opponent. They are set to their mean over one pass in batches, each image cut
    or padded around the centre to the spec's `input_shape`, as training views are.

    Args:
        spec: what `build_encoder` needs.
        images: preprocessed training images; not looked at where there is no batch normalisation.
        seed: of the weights.
        device: where to run it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(spec).eval().to(device)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    if norms:
        shape = spec.input_shape
        with torch.inference_mode():
            for batch in batch_images(pad_or_crop(image, shape=shape).array for image in images):
                if len(batch) > 1:  # one image has no spread
                    encoder(batch.to(device))
    return encoder.eval()


def principal_components(fit_images: Iterable[Volume], images: Iterable[Volume], *, shape: Sequence[int]) -> Array:
    """Pixels of preprocessed images, reduced to the space of at most 64 principal components.

    Images are scaled to `shape`, their aspect kept and the rest padded (a smaller shape of the same proportions where
    that would be more than 65536 pixels). The axes of that space are turned at random, always alike: protocols
    standardise every feature, which on the components themselves would blow noise up to the size of the signal
    (whitening; X-rays with 47 labels: AUROC 0.84 in place of 0.96).

    Args:
        fit_images: N images whose components are taken, without labels.
        images: the images wanted.
        shape: the encoder's input shape.

    Returns:
        (M, min(64, N - 1, pixels)) float32.
    """
    scale = min(1.0, (MAX_PIXELS / np.prod(shape)) ** (1 / len(shape)))
    small_shape = tuple(max(1, int(side * scale)) for side in shape)
    fit_rows, image_rows = (
        np.stack([resize(v, shape=small_shape).array.ravel() for v in group]) for group in (fit_images, images)
    )
    count = max(1, min(MAX_COMPONENTS, len(fit_rows) - 1, fit_rows.shape[1]))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((count, count))).Q
    return np.asarray(PCA(count, random_state=0).fit(fit_rows).transform(image_rows) @ rotation, np.float32)
