"""Match the distribution of the summary to a prior by adversarial training (eq. 7 of Hjelm et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn.functional import softplus

from medim.config import Size
from medim.objectives.objective import Encode, Term
from medim.types import Views


class PriorMatching(nn.Module):
    """Train a discriminator between summaries and samples of a prior, and the encoder against it.

    The discriminator D has its own step, with a detached encoder and a gradient penalty per sample (Mescheder et al.
    2018). The encoder minimises the non-saturating softplus(-D). With the uniform prior, D reads sigmoid(summary); all
    other objectives read the summary itself.

    Args:
        summary_channels: length of the summary.
        prior: uniform on [0, 1] (the best in the paper) or standard normal.
        hidden: widths of the discriminator's hidden layers.
        gradient_penalty: weight of the squared gradient norm of D.
    """

    def __init__(
        self,
        summary_channels: int,
        *,
        prior: Literal["uniform", "gaussian"] = "uniform",
        hidden: tuple[Size, ...] = (1000, 200),
        gradient_penalty: float = 1.0,
    ) -> None:
        super().__init__()
        self._prior = prior
        self._penalty = gradient_penalty
        widths = (summary_channels, *hidden)
        layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.discriminator = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `prior_matching`: softplus(-D(z)), with fixed parameters of D."""
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(False)
        fake = self._squash(encode.clean.summary)
        with torch.autocast(fake.device.type, enabled=False):
            loss = softplus(-self.discriminator(fake)).mean()
        for parameter in self.discriminator.parameters():
            parameter.requires_grad_(True)
        return {"prior_matching": Term(loss)}

    def adversary_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the discriminator, for its own optimiser."""
        return self.discriminator.parameters()

    def adversary_loss(self, encode: Encode, views: Views) -> torch.Tensor:
        """softplus(-D(prior)) + softplus(D(z)) + penalty; no gradient reaches the encoder."""
        fake = self._squash(encode.clean.summary.detach()).requires_grad_()
        draw = torch.rand if self._prior == "uniform" else torch.randn
        real = draw(fake.shape, generator=encode.generator).to(fake).requires_grad_()
        with torch.autocast(fake.device.type, enabled=False):
            real_scores, fake_scores = self.discriminator(real), self.discriminator(fake)
            loss = softplus(-real_scores).mean() + softplus(fake_scores).mean()
            gradients = torch.autograd.grad(real_scores.sum() + fake_scores.sum(), (real, fake), create_graph=True)
            penalty = torch.stack([g.square().sum(dim=1).mean() for g in gradients]).mean()
        return loss + self._penalty * penalty

    def _squash(self, summary: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(summary.float()) if self._prior == "uniform" else summary.float()
