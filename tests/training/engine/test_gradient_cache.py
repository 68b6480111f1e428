"""Encoding in chunks: the gradient of the whole batch, in the memory of its features and one chunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medim.models.decoders import UNetDecoder
from medim.models.encoders import UNetEncoder
from medim.models.encoders.resnet import ResNet
from medim.objectives.infomax import LocalDIM
from medim.objectives.reconstruction import Reconstruction
from medim.training.engine.gradient_cache import encode_in_chunks
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Features, UsageError, Views

Gradients = dict[str, torch.Tensor]


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def step(
    encoder: nn.Module, objective: Any, image: torch.Tensor, chunk: int | None, decoder: nn.Module | None = None
) -> tuple[Gradients, int]:
    """Gradients of one step by parameter, and the most bytes of tensors at a time."""
    for part in (encoder, objective, *([decoder] if decoder else [])):
        part.zero_grad(set_to_none=True)
    views = Views(image[:, None], torch.zeros(len(image), 1, image.ndim - 2))
    with Live() as live:
        encode: Any = StepEncoder(encoder, decoder, views, torch.Generator().manual_seed(3), chunk=chunk)
        terms = objective(encode, views)
        torch.stack([term.loss for term in terms.values()]).sum().backward()
        del encode, terms
    named = [*encoder.named_parameters("encoder"), *objective.named_parameters("objective")]
    named += list(decoder.named_parameters("decoder")) if decoder else []
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, live.peak


def furthest(one: Gradients, other: Gradients) -> float:
    """The largest difference, over the largest entry."""
    assert one.keys() == other.keys()
    size = max(float(value.abs().max()) for value in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / size


def infonce(encoder: Any, side: int, level: int = -1) -> LocalDIM:
    critic = {"name": "encode_and_dot", "width": 16, "local_norm": "none", "summary_norm": "none", "scale_scores": True}
    fields = tuple(encoder.receptive_field(i) for i in range(len(encoder.channels)))
    shapes = encoder.channels, encoder.summary_channels, (side, side), fields, encoder.origins, encoder.strides
    return LocalDIM(*shapes, feature_level=level, critic=critic, batch_norm_summary=True)


def test_256_images_in_chunks_of_32_give_the_gradient_of_256_in_less_than_a_third_of_the_memory() -> None:
    torch.manual_seed(0)
    encoder = ResNet(1, 2, (32, 32), widths=(8, 16, 32), norm="gn", summary="mean_max", hidden=0, summary_channels=16)
    objective, image = infonce(encoder, 32), torch.randn(256, 1, 32, 32)
    (chunked, small), (direct, large) = (step(encoder, objective, image, chunk) for chunk in (32, None))
    assert furthest(direct, chunked) < 1e-5
    assert small < large / 3, f"{small / large:.2f}"


def test_accumulating_over_small_batches_gives_another_gradient() -> None:
    torch.manual_seed(0)
    encoder = UNetEncoder(1, 2, channels=(4, 8), norm="in", summary_channels=6)
    objective, image = infonce(encoder, 8), torch.randn(16, 1, 8, 8)
    direct, _ = step(encoder, objective, image, None)
    parts = [step(encoder, objective, part, None)[0] for part in image.split(4)]
    summed = {name: torch.stack([part[name] for part in parts]).mean(0) for name in direct}
    assert furthest(direct, summed) > 0.1
    assert furthest(direct, step(encoder, objective, image, 4)[0]) < 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 8, 100], ids=lambda size: f"chunks of {size}")
def test_a_decoder_goes_in_chunks_too(chunk: int) -> None:
    torch.manual_seed(0)
    encoder = UNetEncoder(1, 2, channels=(4, 8), norm="in", summary_channels=6)
    decoder = UNetDecoder((4, 8), (1, 2), 2, norm="in")
    objective, image = Reconstruction(1, 2, (8, 8), 4, mask_patch_size=2), torch.randn(8, 1, 8, 8)
    direct, _ = step(encoder, objective, image, None, decoder)
    assert any(name.startswith("decoder") for name in direct)
    assert furthest(direct, step(encoder, objective, image, chunk, decoder)[0]) < 1e-5


def test_every_chunk_but_the_last_is_full_and_runs_once_more_in_the_backward_pass() -> None:
    sizes: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, image: torch.Tensor) -> Features:
            sizes.append(len(image))
            return Features((self.weight * image,), image.flatten(1))

    found = encode_in_chunks(Watched(), torch.ones(7, 1, 2, 2), 3)
    assert sizes == [3, 3, 1]
    assert found.maps[0].shape == (7, 1, 2, 2)
    found.maps[0].sin().sum().backward()  # type: ignore[no-untyped-call]
    assert sorted(sizes) == [1, 1, 3, 3, 3, 3]
    sizes.clear()
    with torch.no_grad():
        encode_in_chunks(Watched(), torch.ones(7, 1, 2, 2), 3)
    assert sizes == [3, 3, 1]


def test_dropout_drops_the_same_in_both_passes() -> None:
    torch.manual_seed(0)

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.drop = nn.Dropout(0.5)

        def forward(self, image: torch.Tensor) -> Features:
            kept = self.drop(image * self.scale)
            return Features((kept[..., None],), (kept * kept).sum(1, keepdim=True))

    network, image = Dropping(), torch.ones(8, 4)
    found = encode_in_chunks(network, image, 2)
    found.summary.sum().backward()  # type: ignore[no-untyped-call]
    kept = (found.maps[0] != 0).squeeze(-1).float()
    assert torch.allclose(network.scale.grad, (2 * 2 * 2 * kept).sum(0)), "d/ds (2 s)^2 of what was kept"


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_batch_statistics_are_refused_with_what_to_change(where: str) -> None:
    norms: dict[str, Any] = {"encoder": "in", "decoder": "in", where: "bn"}
    encoder = UNetEncoder(1, 2, channels=(4, 8), norm=norms["encoder"], summary_channels=6)
    decoder = UNetDecoder((4, 8), (1, 2), 2, norm=norms["decoder"])
    made: Callable[..., PretrainModule] = PretrainModule
    with pytest.raises(UsageError, match=r"gradient_cache_chunk: 4 does not work with batch normalisation.*norm: in"):
        made(encoder, decoder, {}, optimisation={}, gradient_clip=0.0, seed=0, chunk=4)
