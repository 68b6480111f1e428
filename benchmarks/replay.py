"""Record the passes through encoder and decoder of a training step, to repeat them without the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timing import RunParts

from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features


def record_passes(run: RunParts) -> list[Pass]:
    """Record the passes of one step of a run."""
    recorder = Recorder(run.encoder, run.decoder, run.views, torch.Generator().manual_seed(0))
    run.step(recorder)
    return recorder.passes


class Recorder(StepEncoder):
    """Encoder of one step that records its inputs and outputs."""

    passes: list[Pass]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.passes = []

    def __call__(self, image: torch.Tensor) -> Features:
        """Encode (N, C, ...); the recorded pass begins at the image and ends at the inputs of the objectives."""
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
    """Forward and backward pass of an encoder or decoder with the gradients of a recorded step.

    Attributes:
        module: encoder or decoder.
        inputs: inputs of the module.
        outputs: recorded outputs with their gradients, if the step computed any.
    """

    module: Any
    inputs: Any
    outputs: list[torch.Tensor]

    def __call__(self) -> None:
        """Repeat the pass."""
        features = self.module(self.inputs)
        pairs = zip((*features.maps, features.summary), self.outputs, strict=False)
        active = [(output, target.grad) for output, target in pairs if target.grad is not None]
        if active:
            outputs, gradients = zip(*active, strict=True)
            torch.autograd.backward(outputs, gradients)


def detach_features(features: Features) -> Features:
    """Detach features from the computation graph."""
    maps, summary = ([x.detach().requires_grad_() for x in part] for part in (features.maps, [features.summary]))
    return Features(tuple(maps), summary[0])
