"""Variational auto-encoders: a compressed summary from which the image is reconstructed."""

from __future__ import annotations

import torch
from torch import nn

from medim.config import Size
from medim.models.decoders import ImageDecoder
from medim.models.layers import Norm, pool_map
from medim.objectives.objective import Encode, Term
from medim.types import UsageError, Views


class VAE(nn.Module):
    """Encode to a normal distribution, sample from it, decode the image (Kingma and Welling 2014, arXiv 1312.6114).

    The mean is the summary of the encoder. The logarithm of the standard deviation is linear in the mean and maximum of
    the coarsest map (the papers compute both from one hidden layer, which is not part of the encoder interface here).
    The loss is the squared error summed over the values of an image plus beta times the KL divergence from a standard
    normal in nats (the baseline of Hjelm et al. 2019 in its public code), divided by the summed variance of the batch's
    images around their mean. This division keeps the balance of error and KL and the units of `beta`, and makes losses
    comparable between shapes and contrasts. The squared error grows with the number of values and the KL with the
    length of the summary, so the invariant between sizes is beta * summary_channels / values (Higgins et al. 2017):
    increase beta for volumes.

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        in_channels: channels of the image.
        input_shape: spatial shape of the views.
        beta: weight of the KL divergence.
        decoder_channels: channels of the decoder, coarse to fine; each but the first doubles the grid.
        norm: the decoder's normalisation: batch (bn), instance (in) or group (gn).
    """

    draws_per_image = True
    blind_loss_is_chance = False  # chance is a decoder of the mean image, which needs weights

    def __init__(
        self,
        channels: tuple[int, ...],
        summary_channels: int,
        in_channels: int,
        input_shape: tuple[int, ...],
        *,
        beta: float = 1.0,
        decoder_channels: tuple[Size, ...] = (512, 256, 128, 64),
        norm: Norm = "bn",
    ) -> None:
        super().__init__()
        if beta < 0:
            raise UsageError(f"vae.beta: expected 0 or more, got {beta}.")
        self._beta = beta
        self.to_log_sigma = nn.Linear(2 * channels[-1], summary_channels)
        self.decoder = ImageDecoder(summary_channels, in_channels, input_shape, channels=decoder_channels, norm=norm)

    def forward(self, encode: Encode, views: Views) -> dict[str, Term]:
        """Term `vae`: (squared error + beta KL) / variance around the mean image, estimated on the batch.

        Chance is 1: the loss of a decoder that outputs the mean image, with a KL of 0.
        """
        image = views.image.flatten(0, 1).float()  # (N, C, ...)
        mu = encode.clean.summary.float()
        log_sigma = self.to_log_sigma(pool_map(encode.clean.maps[-1])).float()
        noise = torch.randn(mu.shape, generator=encode.generator).to(mu)
        reconstruction = self.decoder(mu + log_sigma.exp() * noise).float()
        variance = image.var(dim=0).sum().clamp_min(1e-12)
        error = (reconstruction - image).square().sum() / len(image) / variance
        kl = kl_from_normal(mu, log_sigma).mean()
        diagnostics = {"kl": kl.detach(), "error": error.detach(), "active_units": count_active_units(mu.detach())}
        return {"vae": Term(error + self._beta * kl / variance, 1.0, diagnostics)}


def beta_vae(
    channels: tuple[int, ...],
    summary_channels: int,
    in_channels: int,
    input_shape: tuple[int, ...],
    *,
    beta: float = 4.0,
    decoder_channels: tuple[Size, ...] = (512, 256, 128, 64),
    norm: Norm = "bn",
) -> VAE:
    """VAE with a larger weight of the KL divergence: a sparser summary with less information (Higgins et al. 2017).

    Args:
        channels: channels of the encoder's maps.
        summary_channels: length of the summary.
        in_channels: channels of the image.
        input_shape: spatial shape of the views.
        beta: weight of the KL divergence; above 1.
        decoder_channels: channels of the decoder, coarse to fine; each but the first doubles the grid.
        norm: the decoder's normalisation: batch (bn), instance (in) or group (gn).
    """
    return VAE(
        channels, summary_channels, in_channels, input_shape, beta=beta, decoder_channels=decoder_channels, norm=norm
    )


def kl_from_normal(mu: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mu, sigma^2) from the standard normal (appendix B of 1312.6114), in nats: (N, S) to (N,)."""
    return 0.5 * (mu.square() + (2 * log_sigma).exp() - 2 * log_sigma - 1).sum(dim=1)


def count_active_units(mu: torch.Tensor) -> torch.Tensor:
    """Count entries of the mean (N, S) with a variance between images above 0.01 (Burda et al. 2016, section 5.2)."""
    return (mu.var(dim=0) > 0.01).sum().float()
