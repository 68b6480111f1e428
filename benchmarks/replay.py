"""The passes through encoder and decoder that a step makes, to be made again without the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timing import Run

from medim.training.pretrain.step_encoder import StepEncode
from medim.types import Features


def passes_of(run: Run) -> list[Pass]:
    """Those of one step of a run."""
    recorder = Recorder(run.encoder, run.decoder, run.views, torch.Generator().manual_seed(0))
    run.step(recorder)
    return recorder.passes


class Recorder(StepEncode):
    """Encodes and decodes for one step, and keeps what came in and went out."""

    passes: list[Pass]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passes = []

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode (N, C, ...); the pass starts at the image and ends at what objectives get."""
        found = cut(super().__call__(image))
        self.passes.append(Pass(self._encoder, image, [*found.maps, found.summary]))
        return found

    def decode(self, features: Features) -> torch.Tensor:
        """Decode to one map."""
        decoded = super().decode(features)
        decoded.retain_grad()
        self.passes.append(Pass(self._decoder, cut(features), [decoded]))
        return decoded


@dataclass
class Pass:
    """Forward and backward pass of an encoder or decoder, with the gradients that came back in the step.

    Attributes:
        module: it.
        given: what goes in.
        seen: its first outputs, as an objective saw them: they hold the gradients that came back, or none.
    """

    module: Any
    given: Any
    seen: list[torch.Tensor]

    def __call__(self) -> None:
        """Do it again."""
        found = self.module(self.given)
        pairs = zip((*found.maps, found.summary), self.seen, strict=False)
        used = [(output, seen.grad) for output, seen in pairs if seen.grad is not None]
        if used:
            outputs, gradients = zip(*used, strict=True)
            torch.autograd.backward(outputs, gradients)


def cut(features: Features) -> Features:
    """The same features, as if they came from nowhere."""
    maps, summary = ([x.detach().requires_grad_() for x in part] for part in (features.maps, [features.summary]))
    return Features(tuple(maps), summary[0])
