"""Critics: score networks T(local, summary) whose scores estimate mutual information.

A critic takes locals (B, C, L) and summaries (A, S, G) and scores every pair: (A, G, B, L), in fp32 under autocast
too, for bf16 scores are rounded in steps that hide learning (measured: docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

OutputNorm = Literal["layer", "batch", "none"]


class _Embedding(nn.Module):
    """1x1 conv, BN, ReLU, 1x1 conv, plus a linear shortcut that starts as a noisy copy; then a norm over channels.

    `MI1x1ConvNet` of the DIM authors' code (nn_modules/mi_networks.py), over flattened locations (B, C, L).
    """

    def __init__(self, in_channels: int, width: int, norm: OutputNorm) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(in_channels, width, 1, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Conv1d(width, width, 1),
        )
        self.shortcut = nn.Conv1d(in_channels, width, 1, bias=False)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01)
            diagonal = torch.arange(min(in_channels, width))
            self.shortcut.weight[diagonal, diagonal, 0] = 1.0
        self.norm: nn.Module | None = {
            "layer": nn.LayerNorm(width),
            "batch": nn.BatchNorm1d(width, affine=False),
            "none": None,
        }[norm]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, L) to (B, width, L)."""
        x = self.block(x) + self.shortcut(x)
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)
        return x if self.norm is None else self.norm(x)


class EncodeAndDot(nn.Module):
    """Embed both sides and take the dot product (Hjelm et al. 2019, appendix; the paper's main results).

    Args:
        channels: channels of the local features.
        summary_channels: channels of the summary.
        width: size of the common space (2048 in the paper; its arithmetic is then fourteen times the paper's 32x32
            encoder).
        local_norm: norm of the embedded locals.
        summary_norm: norm of the embedded summary.
        scaled: divide scores by sqrt(width), as AMDIM does.
        clip: bound scores softly by clip * tanh(score / clip); 0 does not (AMDIM: 20).
    """

    def __init__(
        self,
        channels: int,
        summary_channels: int,
        *,
        width: int = 2048,
        local_norm: OutputNorm = "layer",
        summary_norm: OutputNorm = "layer",
        scaled: bool = False,
        clip: float = 0.0,
    ) -> None:
        super().__init__()
        self.local = _Embedding(channels, width, local_norm)
        self.summary = _Embedding(summary_channels, width, summary_norm)
        self._scale = width**-0.5 if scaled else 1.0
        self._clip = clip

    def forward(self, local: torch.Tensor, summary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score every pair.

        Args:
            local: (B, C, L).
            summary: (A, S, G).

        Returns:
            Scores (A, G, B, L) in fp32, and the mean of their squares before clipping (for a penalty).
        """
        embedded_local, embedded_summary = self.local(local), self.summary(summary)
        with torch.autocast(local.device.type, enabled=False):
            scores = torch.einsum("aug,bul->agbl", embedded_summary.float(), embedded_local.float()) * self._scale
            square = scores.square().mean()
            return (self._clip * torch.tanh(scores / self._clip) if self._clip else scores), square


CRITICS: dict[str, Callable[..., nn.Module]] = {"encode_and_dot": EncodeAndDot}
