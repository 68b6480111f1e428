"""Dense Deep InfoMax: voxel-level InfoNCE between the decoded features of an occluded view and of a clean view."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from medim.config import Share, Size, SizeOrZero
from medim.objectives.objective import Encode, Term
from medim.objectives.occlusion import check_cubes, draw_cube_mask, occlude_image
from medim.types import Features, UsageError, Views

DenseNegatives = Literal["same_image", "other_images", "all"]


class DenseDIM(nn.Module):
    """Local-to-local InfoNCE at voxel level, through encoder and decoder.

    This objective is not in the paper. It applies DIM's InfoNCE estimator (van den Oord et al. 2018) to the decoded
    features of two views of the same position; random cubes of the second view are filled with its mean. Points are
    drawn over the whole view, hidden or not. Each point is a query in the occluded view, and its positive is the same
    voxel of the clean view. The decoder is saved together with the encoder, and segmentation fine-tuning starts from
    both.

    With one view per image, the clean view is paired with its own occluded version. With two views, the first stays
    clean and the second is occluded; both must be cut at the same position and be augmented in intensity only.

    DIM uses raw scores. Here they are stabilised by default as in AMDIM (Bachman et al. 2019): divided by sqrt(width),
    penalised and clipped.

    Args:
        input_shape: spatial shape of the views.
        decoded_channels: channels of the decoded map; 0 if the run has no decoder.
        aligned: whether a voxel shows the same position in every view of an image.
        width: width of the space that decoded features are projected to before the dot product.
        points: number of voxels drawn per image.
        negatives: negatives of a point: the other points of the same image, those of other images, or all.
        mask_patch_size: side of a hidden cube, in voxels.
        mask_ratio: share of hidden cubes, above 0 and below 1.
        scale_scores: divide scores by sqrt(width).
        clip: soft bound of the scores, clip * tanh(score / clip); 0 disables it.
        score_penalty: weight of the mean squared score before clipping.
    """

    reads_summary = False
    draws_per_image = True

    def __init__(
        self,
        input_shape: tuple[int, ...],
        decoded_channels: int,
        aligned: bool,
        *,
        width: Size = 64,
        points: SizeOrZero = 160,
        negatives: DenseNegatives = "same_image",
        mask_patch_size: Size = 8,
        mask_ratio: Share = 0.6,
        scale_scores: bool = True,
        clip: float = 20.0,
        score_penalty: float = 0.04,
    ) -> None:
        super().__init__()
        if not decoded_channels:
            raise UsageError(
                "dense_dim: it needs a decoder; add a decoder to the config, such as decoder: {name: unet}."
            )
        if not aligned:
            raise UsageError(
                "dense_dim: expected views with corresponding voxels, got views cut at different positions or "
                "moved by an augmentation. Set views.same_crop: true and take flip and affine out of "
                "views.augmentations, or set views.count: 1."
            )
        if not 2 <= points <= math.prod(input_shape):
            raise UsageError(
                f"dense_dim.points: expected 2 to the number of voxels of a view of {input_shape}, got {points}."
            )
        check_cubes("dense_dim", input_shape, mask_patch_size, mask_ratio)
        self._points, self._negatives = points, negatives
        self._mask_patch_size, self._mask_ratio = mask_patch_size, mask_ratio
        self._scale = width**-0.5 if scale_scores else 1.0
        self._clip, self._penalty = clip, score_penalty
        self.projection = nn.Sequential(
            nn.Linear(decoded_channels, width), nn.ReLU(inplace=True), nn.Linear(width, width)
        )

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `dense_dim`: cross-entropy in nats over the classes of a query; chance is the log of their number.

        Diagnostics: the bound, and the share of queries with the highest score for the correct point.
        """
        batch, count, _, *shape = views.image.shape
        cube_mask = draw_cube_mask(batch, tuple(shape), self._mask_patch_size, self._mask_ratio, encode.generator)
        index = draw_points(batch, math.prod(shape), self._points, encode.generator).to(views.image.device)
        clean = Features(tuple(map_[::count] for map_ in encode.clean.maps), encode.clean.summary[::count])
        occluded = encode(occlude_image(views.image[:, -1], cube_mask))
        query, key = (self._project(encode.decode(features), index) for features in (occluded, clean))
        with torch.autocast(query.device.type, enabled=False):
            scores, square = score_classes(query.float(), key.float(), self._negatives, self._scale, self._clip)
            target_index = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[:2])
            loss = cross_entropy(scores.flatten(0, 1), target_index.flatten())
        n_other_points = (batch - 1) * self._points
        classes = {"same_image": self._points, "other_images": 1 + n_other_points, "all": self._points + n_other_points}
        chance = math.log(classes[self._negatives])
        diagnostics = {
            "bound": chance - loss.detach(),
            "retrieval": (scores.detach().argmax(dim=2) == target_index).float().mean(),
        }
        return {"dense_dim": Term(loss + self._penalty * square, chance, diagnostics)}

    def _project(self, decoded: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Project the voxels `index` (N, P) of a map (N, C, ...): (N, P, width)."""
        voxels = decoded.flatten(2).gather(2, index.unsqueeze(1).expand(-1, decoded.shape[1], -1))
        return self.projection(voxels.transpose(1, 2))


def draw_points(count: int, voxels: int, points: int, generator: torch.Generator) -> torch.Tensor:
    """Draw distinct voxels, one from each of `points` runs of equal length with a random origin; fast for large views.

    Args:
        count: number of images.
        voxels: number of voxels per image.
        points: number of points per image, at most `voxels`.
        generator: source of randomness, on the CPU.

    Returns:
        (count, points) int64; every voxel has the same probability.
    """
    run = voxels // points
    within = torch.randint(run, (count, points), generator=generator)
    start = torch.randint(voxels, (count, 1), generator=generator)
    return (start + run * torch.arange(points) + within) % voxels


def score_classes(
    query: torch.Tensor, key: torch.Tensor, negatives: DenseNegatives, scale: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every query against its classes; the correct class of row k is column k.

    Args:
        query: (N, P, D), the points of N occluded views.
        key: (N, P, D), the same points of the clean views.
        negatives: keys to use as negatives.
        scale: factor of the dot products.
        clip: soft bound of the scores; 0 disables it.

    Returns:
        Scores (N, P, P) for `same_image`, else (1, N * P, N * P) with minus infinity for excluded keys; and the mean of
        the squared scores before clipping.
    """
    count, points, _ = query.shape
    if negatives != "same_image":
        query, key = query.flatten(0, 1).unsqueeze(0), key.flatten(0, 1).unsqueeze(0)
    scores = scale * query @ key.transpose(1, 2)
    square = scores.square().mean()
    scores = clip * torch.tanh(scores / clip) if clip else scores
    if negatives == "other_images":
        image = torch.arange(count, device=scores.device).repeat_interleave(points)
        same_image = (image.unsqueeze(1) == image).fill_diagonal_(False)
        scores = scores.masked_fill(same_image, -math.inf)
    return scores, square
