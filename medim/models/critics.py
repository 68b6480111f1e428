"""Critics: score networks T(local, summary) for the estimation of mutual information.

A critic takes local features (B, C, L) and summaries (A, S, G) and scores pairs: (A, G, B, L). Scores are in fp32 under
autocast too, because the rounding steps of bf16 scores hide learning (measured in docs/results.md). `pairs`, bool and
broadcastable to the scores, selects the pairs that are used; scores of other pairs are undefined. A critic also returns
the mean of the squared scores before clipping, over the selected pairs, for a penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from torch.utils.checkpoint import checkpoint

from medim.config import Size
from medim.types import UsageError

OutputNorm = Literal["layer", "batch", "batch_affine", "none"]
_MAX_HIDDEN_UNITS = 2**24  # hidden units that a concat-and-convolve critic keeps in memory at a time


class _CriticEmbedding(nn.Module):
    """1x1 conv, BN, ReLU, 1x1 conv, plus a linear shortcut initialised as a noisy copy; then a norm over channels.

    `MI1x1ConvNet` of the DIM authors' code (nn_modules/mi_networks.py), over flattened locations (B, C, L). With
    `batch_affine`, `ConvHead` of Entodi/fusion (architecture/projection_head), without a shortcut `LatentHead`: neither
    has a bias.
    """

    def __init__(self, in_channels: int, width: int, norm: OutputNorm, *, has_shortcut: bool = True) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(in_channels, width, 1, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, 1, bias=has_shortcut and norm != "batch_affine"),
        )
        self.shortcut: nn.Conv1d | None = None
        if has_shortcut:
            self.shortcut = nn.Conv1d(in_channels, width, 1, bias=False)
            with torch.no_grad():
                self.shortcut.weight.uniform_(-0.01, 0.01)
                diagonal = torch.arange(min(in_channels, width))
                self.shortcut.weight[diagonal, diagonal, 0] = 1.0
        self.norm: nn.Module | None = {
            "layer": nn.LayerNorm(width),
            "batch": nn.BatchNorm1d(width, affine=False),
            "batch_affine": nn.BatchNorm1d(width),
            "none": None,
        }[norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, L) to (B, width, L)."""
        x = self.block(x) if self.shortcut is None else self.block(x) + self.shortcut(x)
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x if self.norm is None else self.norm(x)


class EncodeAndDot(nn.Module):
    """Embed both sides and take the dot product (Hjelm et al. 2019, appendix; the paper's main results).

    Args:
        channels: channels of the local features.
        summary_channels: channels of the summary.
        width: size of the common space (2048 in the paper; this costs fourteen times the arithmetic of the paper's
            32x32 encoder).
        local_norm: norm of the embedded local features.
        summary_norm: norm of the embedded summary.
        summary_shortcut: add a linear map of the summary to its embedding, as for the local features.
        scale_scores: divide scores by sqrt(width), as AMDIM does.
        clip: soft bound of the scores, clip * tanh(score / clip); 0 disables it (AMDIM: 20).
    """

    def __init__(
        self,
        channels: int,
        summary_channels: int,
        *,
        width: Size = 2048,
        local_norm: OutputNorm = "layer",
        summary_norm: OutputNorm = "layer",
        summary_shortcut: bool = True,
        scale_scores: bool = False,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.local = _CriticEmbedding(channels, width, local_norm)
        self.summary = _CriticEmbedding(summary_channels, width, summary_norm, has_shortcut=summary_shortcut)
        self._scale = width**-0.5 if scale_scores else 1.0
        self._clip = clip

    def forward(
        self, local: torch.Tensor, summary: torch.Tensor, pairs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score every pair.

        Args:
            local: (B, C, L).
            summary: (A, S, G).
            pairs: bool, broadcastable to (A, G, B, L): pairs to include in the mean square; None: all.

        Returns:
            Scores (A, G, B, L) in fp32, and the mean of their squares before clipping (for a penalty).
        """
        return _clip_scores(
            _score_dot_products(self.summary(summary), self.local(local), self._scale), pairs, self._clip
        )


class ConcatAndConvolve(nn.Module):
    """Join each local feature with the summary and score it with a small network (Hjelm et al. 2019, figures 2 and 3).

    The network consists of 1x1 convolutions with ReLU and no norm. The first layer is split into two linear parts, one
    over the local features and one over the summaries, so that no tensor of repeated features is built. A pair costs
    hidden[0] * hidden[1] products, compared with one dot product in encode-and-dot: limit the number of pairs
    (`negatives: rolled`).

    Args:
        channels: channels of the local features.
        summary_channels: channels of the summary.
        hidden: widths of the hidden layers.
        clip: soft bound of the scores, clip * tanh(score / clip); 0 disables it (AMDIM: 20).
    """

    def __init__(
        self, channels: int, summary_channels: int, *, hidden: tuple[int, ...] = (512, 512), clip: float = 0.0
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise UsageError(f"concat_and_convolve.hidden: expected one or more widths above 0, got {list(hidden)}.")
        self._input_widths = [channels, summary_channels]
        self._max_width = max(hidden)
        self._clip = clip
        self.hidden = nn.ModuleList(nn.Linear(*widths) for widths in pairwise((sum(self._input_widths), *hidden)))
        self.score = nn.Linear(hidden[-1], 1)

    def forward(
        self, local: torch.Tensor, summary: torch.Tensor, pairs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score pairs.

        Args:
            local: (B, C, L).
            summary: (A, S, G).
            pairs: bool, broadcastable to (A, G, B, L): pairs to score; None: all.

        Returns:
            Scores (A, G, B, L) in fp32, 0 for pairs that are not scored, and the mean of their squares before clipping.
        """
        first_layer: Any = self.hidden[0]
        local_weight, summary_weight = first_layer.weight.split(self._input_widths, dim=1)
        summary_hidden = _promote_to_float32(
            linear(summary.transpose(1, 2).flatten(0, 1), summary_weight)
        )  # (A G, hidden)
        local_hidden = _promote_to_float32(
            linear(local.transpose(1, 2).flatten(0, 1), local_weight, first_layer.bias)
        )  # (B L, hidden)
        shape = (summary.shape[0], summary.shape[2], local.shape[0], local.shape[2])
        if torch.compiler.is_exporting():  # an exported graph accepts any number of pairs and cannot loop over blocks
            return _clip_scores(
                self._score_hidden(summary_hidden[:, None] + local_hidden).reshape(shape), pairs, self._clip
            )
        pair_indices = None if pairs is None else pairs.expand(shape).flatten().nonzero().squeeze(1)
        count = math.prod(shape) if pair_indices is None else len(pair_indices)
        block_size = max(1, _MAX_HIDDEN_UNITS // self._max_width)
        blocks = [
            (summary_hidden, local_hidden, pair_indices, start, min(start + block_size, count))
            for start in range(0, max(count, 1), block_size)
        ]
        if len(blocks) == 1:
            scores = self._score_block(*blocks[0])
        else:  # hidden units are recomputed in the backward pass
            scores = torch.cat([checkpoint(self._score_block, *block, use_reentrant=False) for block in blocks])
        if pair_indices is not None:
            scores = scores.new_zeros(math.prod(shape)).index_copy(0, pair_indices, scores)
        return _clip_scores(scores.reshape(shape), pairs, self._clip)

    def _score_block(
        self,
        summary_hidden: torch.Tensor,
        local_hidden: torch.Tensor,
        pair_indices: torch.Tensor | None,
        start: int,
        stop: int,
    ) -> torch.Tensor:
        """Scores of a block of the selected pairs (None: of all pairs), in row order of `summary_hidden`."""
        pair = (
            torch.arange(start, stop, device=summary_hidden.device)
            if pair_indices is None
            else pair_indices[start:stop]
        )
        # Use an embedding lookup: its gradient is summed in a fixed order on every device.
        x = embedding(pair.div(len(local_hidden), rounding_mode="floor"), summary_hidden) + embedding(
            pair % len(local_hidden), local_hidden
        )
        return self._score_hidden(x)

    def _score_hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Scores (...) of the outputs of the first layer for pairs, (..., hidden[0])."""
        for layer in self.hidden[1:]:
            x = layer(x.relu_())
        with torch.autocast(x.device.type, enabled=False):
            scores: torch.Tensor = self.score(_promote_to_float32(x).relu_()).squeeze(-1)
        return scores


class Bilinear(nn.Module):
    """local^T W summary (van den Oord et al. 2018, eq. 3; ST-DIM, Anand et al. 2019).

    Args:
        channels: channels of the local features.
        summary_channels: channels of the summary.
        scale_scores: divide scores by sqrt(channels).
        clip: soft bound of the scores, clip * tanh(score / clip); 0 disables it (AMDIM: 20).
    """

    def __init__(self, channels: int, summary_channels: int, *, scale_scores: bool = False, clip: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Linear(summary_channels, channels, bias=False)
        self._scale = channels**-0.5 if scale_scores else 1.0
        self._clip = clip

    def forward(
        self, local: torch.Tensor, summary: torch.Tensor, pairs: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score every pair; see `EncodeAndDot`."""
        projection = self.weight(summary.transpose(1, 2)).transpose(1, 2)  # (A, C, G)
        return _clip_scores(_score_dot_products(projection, local, self._scale), pairs, self._clip)


CRITICS: dict[str, Callable[..., nn.Module]] = {
    "encode_and_dot": EncodeAndDot,
    "concat_and_convolve": ConcatAndConvolve,
    "bilinear": Bilinear,
}


def _score_dot_products(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled dot products (A, G, B, L) of (A, U, G) and (B, U, L), in fp32."""
    with torch.autocast(left.device.type, enabled=False):
        return torch.einsum("aug,bul->agbl", _promote_to_float32(left) * scale, _promote_to_float32(right))


def _clip_scores(scores: torch.Tensor, pairs: torch.Tensor | None, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores softly clipped to +-clip (0: unchanged), and the mean square of the unclipped scores over `pairs`."""
    if pairs is None:
        square = scores.square().mean()
    else:
        square = scores.square().mul(pairs).sum() / pairs.expand(scores.shape).sum().clamp_min(1)
    return (clip * torch.tanh(scores / clip) if clip else scores), square


def _promote_to_float32(x: torch.Tensor) -> torch.Tensor:
    """Convert to fp32, or keep a wider type."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
