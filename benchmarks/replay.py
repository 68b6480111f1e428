"""The passes through encoder and decoder that a step makes, to be made again without the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timing import RunParts

from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features


def record_passes(run: RunParts) -> list[Pass]:
    """Those of one step of a run."""
    recorder = Recorder(run.encoder, run.decoder, run.views, torch.Generator().manual_seed(0))
    run.step(recorder)
    return recorder.passes


class Recorder(StepEncoder):
    """Encodes and decodes for one step, and keeps what came in and went out."""

    passes: list[Pass]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passes = []

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode (N, C, ...); the pass starts at the image and ends at what objectives get."""
        features = detach_features(super().__call__(image))
        self.passes.append(Pass(self._encoder, image, [*features.maps, features.summary]))
        return features

    def decode(self, features: Features) -> torch.Tensor:
        """Decode to one map."""
        output = super().decode(features)
        output.retain_grad()
        self.passes.append(Pass(self._decoder, detach_features(features), [output]))
        return output


@dataclass
class Pass:
    """Forward and backward pass of an encoder or decoder, with the gradients that came back in the step.

    Attributes:
        module: it.
        inputs: what goes in.
        outputs: its first outputs, as an objective saw them: they hold the gradients that came back, or none.
    """

    module: Any
    inputs: Any
    outputs: list[torch.Tensor]

    def __call__(self) -> None:
        """Do it again."""
        features = self.module(self.inputs)
        pairs = zip((*features.maps, features.summary), self.outputs, strict=False)
        active = [(output, target.grad) for output, target in pairs if target.grad is not None]
        if active:
            outputs, gradients = zip(*active, strict=True)
            torch.autograd.backward(outputs, gradients)


def detach_features(features: Features) -> Features:
    """The same features, as if they came from nowhere."""
    maps, summary = ([x.detach().requires_grad_() for x in part] for part in (features.maps, [features.summary]))
    return Features(tuple(maps), summary[0])
