"""No training step runs an operation that raises an error on a CUDA device with deterministic algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from medim.model_spec import NetworkSpec
from medim.models import heads
from medim.models.decoders import DECODERS, ImageDecoder
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.models.layers import MeanPool3d
from medim.models.model import build_encoder
from medim.objectives import OBJECTIVES
from medim.types import Features
from tests.training import cuda_operations
from tests.training.cuda_operations import documented_names, find_forbidden, read_list
from tests.training.one_step import RecordOperations, list_cases, load_small, take_step

NORMS = ("bn", "in", "gn", "none")
SMALL_RESNET = {"name": "resnet", "widths": [4, 8], "blocks": [1, 1], "hidden": 8, "summary_channels": 8}
SECTIONS: list[tuple[int, dict[str, Any]]] = [  # side of the image, and section of the configuration
    *(
        (16, {"name": "convnet", "channels": [4, 8], "norm": norm, "summary": summary, "hidden": 8})
        for norm in NORMS
        for summary in ("flatten", "mean_max")
    ),
    (16, {"name": "convnet", "channels": [4, 8], "activation": "leaky_relu", "first_norm": False, "hidden": 0}),
    (32, {"name": "alexnet", "channels": [4, 4, 4, 4, 4], "hidden": 8}),
    *((16, {**SMALL_RESNET, "norm": norm}) for norm in NORMS),
    *(
        (size, {"name": "amdim", "size": size, "width": 4, "depth": 2, "summary_channels": 32, "norm": norm})
        for size in (32, 64, 128)
        for norm in ("none", "gn")
    ),
    (32, {"name": "patches", "patch": 16, "encoder": {**SMALL_RESNET, "norm": "none", "hidden": 0}}),
    *((16, {"name": "unet", "channels": [4, 8, 8], "norm": norm, "summary_channels": 8}) for norm in NORMS),
]


@pytest.fixture(autouse=True)
def _any_algorithm() -> Iterator[None]:
    """Allow every algorithm: trainers of other tests leave the restriction on, which some raise on a CPU too."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)


def record(step: Callable[[], Any]) -> list[Any]:
    """Operations of a function and of the gradient of its result, if it has one."""
    with RecordOperations() as operations:
        result = step()
        result = result[0] if isinstance(result, tuple) else result
        if result.requires_grad:
            result.sum().backward()
    return list(operations.operations.values())


def grad(*shape: int) -> torch.Tensor:
    return torch.rand(shape).requires_grad_()


def resize(mode: str, dims: int, **options: Any) -> Callable[[], Any]:
    return lambda: functional.interpolate(grad(1, 1, *[4] * dims), size=[8] * dims, mode=mode, **options)


def unpool(dims: int) -> Callable[[], Any]:
    pool, inverse = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{dims}d")(2)
    return lambda: inverse(*pool(grad(1, 1, *[4] * dims)))


INDEX = torch.tensor([0, 1])
CALLS: dict[str, list[Callable[[], Any]]] = {
    "torch.nn.AvgPool3d": [lambda: nn.AvgPool3d(2)(grad(1, 1, 4, 4, 4))],
    "torch.nn.AdaptiveAvgPool2d": [lambda: nn.AdaptiveAvgPool2d(2)(grad(1, 1, 4, 4))],
    "torch.nn.AdaptiveAvgPool3d": [lambda: nn.AdaptiveAvgPool3d(2)(grad(1, 1, 4, 4, 4))],
    "torch.nn.AdaptiveMaxPool2d": [lambda: nn.AdaptiveMaxPool2d(2)(grad(1, 1, 4, 4))],
    "torch.nn.FractionalMaxPool2d": [lambda: nn.FractionalMaxPool2d(2, output_size=2)(grad(1, 1, 4, 4))],
    "torch.nn.FractionalMaxPool3d": [lambda: nn.FractionalMaxPool3d(2, output_size=2)(grad(1, 1, 4, 4, 4))],
    **{f"torch.nn.MaxUnpool{dims}d": [unpool(dims)] for dims in (1, 2, 3)},
    "torch.nn.functional.interpolate": [
        resize("linear", 1),
        resize("bilinear", 2),
        resize("bilinear", 2, antialias=True),
        resize("bicubic", 2),
        resize("bicubic", 2, antialias=True),
        resize("trilinear", 3),
    ],
    "torch.nn.ReflectionPad1d": [lambda: nn.ReflectionPad1d(1)(grad(1, 1, 4))],
    "torch.nn.ReflectionPad2d": [lambda: nn.ReflectionPad2d(1)(grad(1, 1, 4, 4))],
    "torch.nn.ReflectionPad3d": [lambda: nn.ReflectionPad3d(1)(grad(1, 1, 4, 4, 4))],
    "torch.nn.NLLLoss": [lambda: nn.NLLLoss()(grad(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long))],
    "torch.nn.CTCLoss": [
        lambda: nn.CTCLoss()(grad(6, 1, 4), torch.ones(1, 2, dtype=torch.long), torch.tensor([6]), torch.tensor([2]))
    ],
    "torch.nn.EmbeddingBag": [lambda: nn.EmbeddingBag(4, 2, mode="max")(INDEX[None])],
    "torch.Tensor.put_": [
        lambda: torch.zeros(4).put_(INDEX, torch.ones(2)),
        lambda: torch.zeros(4).put(INDEX, torch.ones(2)),
    ],
    "torch.histc": [lambda: torch.histc(torch.rand(4), 2)],
    "torch.bincount": [lambda: torch.bincount(INDEX, weights=torch.rand(2))],
    "torch.median": [lambda: torch.median(torch.rand(4, 2), 0), lambda: torch.nanmedian(torch.rand(4, 2), 0)],
    "torch.nn.functional.grid_sample": [
        lambda: functional.grid_sample(grad(1, 1, 4, 4), torch.rand(1, 2, 2, 2), align_corners=False),
        lambda: functional.grid_sample(grad(1, 1, 4, 4, 4), torch.rand(1, 2, 2, 2, 3), align_corners=False),
    ],
    "torch.cumsum": [lambda: torch.rand(4).cumsum(0), lambda: torch.rand(4).cumsum_(0)],
    "torch.Tensor.scatter_reduce": [
        lambda: torch.zeros(4).scatter_reduce(0, INDEX, torch.ones(2), "prod"),
        lambda: torch.zeros(4).scatter_reduce_(0, INDEX, torch.ones(2), "prod"),
    ],
    "torch.Tensor.resize_": [lambda: torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8).resize_(2)],
    "torch.kthvalue": [lambda: torch.kthvalue(torch.rand(4), 2)],
}
HARMLESS: dict[str, Callable[[], Any]] = {
    "classes of rows": lambda: functional.cross_entropy(grad(4, 3), torch.zeros(4, dtype=torch.long)),
    "cumulative sum of integers": lambda: INDEX.cumsum(0),
    "counts without weights": lambda: torch.bincount(INDEX),
    "mean of a bag": lambda: nn.EmbeddingBag(4, 2, mode="mean")(INDEX[None]),
    "sum of a scatter": lambda: torch.zeros(4).scatter_reduce(0, INDEX, torch.ones(2), "sum"),
    "nearest neighbours": lambda: functional.interpolate(grad(1, 1, 4, 4), scale_factor=2),
    "mean of planes": lambda: functional.avg_pool2d(grad(1, 1, 4, 4), 2),
    "resized numbers": lambda: torch.rand(4).resize_(2),
}


def test_the_list_is_that_of_the_installed_pytorch() -> None:
    assert [entry["name"] for entry in read_list()["documented"]] == documented_names()


def test_the_list_refuses_a_newer_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_operations.torch, "__version__", "9.0.1+cu999")
    with pytest.raises(RuntimeError, match=r"is the list of PyTorch 2\.13, and 9\.0\.1\+cu999 is installed"):
        find_forbidden([])


@pytest.mark.parametrize("entry", [*read_list()["documented"], *read_list()["undocumented"]], ids=lambda e: e["name"])
def test_each_name_of_the_list_is_what_its_call_runs(entry: dict[str, Any]) -> None:
    """A misspelt or renamed operation would never be found."""
    found = {
        line.partition(" ")[0].partition(".")[0]
        for call in CALLS[entry["name"]]
        for line in find_forbidden(record(call))
    }
    assert found == {name.partition(".")[0] for name in entry["operations"]}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_deterministic_form_of_a_listed_operation_is_not_found(name: str) -> None:
    assert find_forbidden(record(HARMLESS[name])) == []


@pytest.mark.parametrize("case", list_cases())
def test_a_step_of_every_preset_runs_on_cuda(case: str) -> None:
    assert find_forbidden(take_step(case).operations) == []


def test_the_presets_have_every_objective() -> None:
    names = [case.partition(" ")[2].split(" ")[0] for case in list_cases() if case.startswith("pretrain")]
    assert {section["name"] for name in names for section in load_small("pretrain", name).objectives} == set(OBJECTIVES)


def test_the_sections_are_of_every_encoder() -> None:
    assert {section["name"] for _, section in SECTIONS} == set(ENCODERS)


@pytest.mark.parametrize(
    ("side", "section", "dims"),
    [(side, section, dims) for side, section in SECTIONS for dims in (2, 3)],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_every_encoder_runs_on_cuda(side: int, section: dict[str, Any], dims: int) -> None:
    encoder = build_encoder(NetworkSpec(encoder=section, in_channels=1, spatial_dims=dims, input_shape=(side,) * dims))

    def encode() -> torch.Tensor:
        features: Features = encoder(torch.rand(2, 1, *[side] * dims))
        return torch.stack([*(map_.square().sum() for map_ in features.maps), features.summary.square().sum()])

    assert find_forbidden(record(encode)) == []


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_every_decoder_runs_on_cuda(norm: str, dims: int) -> None:
    assert set(DECODERS) == {"unet"}
    maps = (grad(2, 4, *[8] * dims), grad(2, 8, *[4] * dims))
    for strides in ((1, 2), (2, 4)):
        decoder = DECODERS["unet"]((4, 8), strides, dims, norm=norm)
        run = partial(lambda part: part(Features(maps, grad(2, 8))).maps[0].square(), decoder)
        assert find_forbidden(record(run)) == []
    if norm != "none":
        image = ImageDecoder(8, 1, (16,) * dims, channels=(8, 4), norm=norm)
        assert find_forbidden(record(lambda: image(grad(2, 8)).square())) == []


TARGETS = {
    "classification": lambda dims: torch.tensor([0, 2]),
    "multi_label": lambda dims: torch.tensor([[0.0, 1.0, torch.nan], [1.0, 1.0, 0.0]]),
    "regression": lambda dims: torch.rand(2, 3),
    "segmentation": lambda dims: torch.randint(0, 3, (2, *[8] * dims)),
}


HEAD_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "classification": [{}, {"class_weights": (0.5, 1.0, 1.5)}, {"focal_gamma": 0.5}],
    "segmentation": [{}, {"dice": "image"}, {"class_weights": (0.1, 1.0, 1.9)}, {"focal_gamma": 2.0}],
}


def build_head(name: str, dims: int, **options: Any) -> Any:
    inputs = {"spatial_dims": dims} if name == "segmentation" else {"summary_channels": 8, "maps": (0, -1)}
    return HEADS[name](channels=(4, 8), out_channels=3, **inputs, **options)


def compute_head_loss(head: Any, name: str, dims: int) -> torch.Tensor:
    features = Features((grad(2, 4, *[8] * dims), grad(2, 8, *[4] * dims)), grad(2, 8))
    loss: torch.Tensor = head.loss(head(features), TARGETS[name](dims))
    return loss


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in HEADS for options in HEAD_OPTIONS.get(name, [{}])],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_every_head_runs_on_cuda(name: str, options: dict[str, Any], dims: int) -> None:
    head = build_head(name, dims, **options)
    assert find_forbidden(record(lambda: compute_head_loss(head, name, dims))) == []


@pytest.mark.parametrize("dims", [2, 3])
def test_the_cross_entropy_of_pytorch_on_masks_is_found(dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = functional.cross_entropy
    monkeypatch.setattr(heads, "focal_cross_entropy", lambda logits, mask, *_: plain(logits, mask[:, 0]))
    head = build_head("segmentation", dims)
    assert find_forbidden(record(lambda: compute_head_loss(head, "segmentation", dims))) == [
        "nll_loss2d_backward.default (torch.nn.NLLLoss)",
        "nll_loss2d_forward.default (torch.nn.NLLLoss)",
    ]


def test_the_fault_is_found_in_a_whole_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = functional.cross_entropy
    monkeypatch.setattr(heads, "focal_cross_entropy", lambda logits, mask, *_: plain(logits, mask[:, 0]))
    found = find_forbidden(take_step.__wrapped__("finetune mri-demo-segmentation").operations)
    assert len(found) == 2


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_the_mean_of_a_window_is_that_of_pytorch(kernel: int) -> None:
    stride = max(1, kernel // 2)
    one, other = (
        torch.rand(2, 3, 7, 8, 9, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        for _ in range(2)
    )
    found, expected = MeanPool3d(kernel, stride)(one), nn.AvgPool3d(kernel, stride)(other)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_cross_entropy_of_masks_is_that_of_pytorch(dims: int) -> None:
    logits = [
        (8 * torch.randn(2, 3, *[5] * dims, generator=torch.Generator().manual_seed(0))).requires_grad_()
        for _ in range(2)
    ]
    mask = torch.randint(0, 3, (2, *[5] * dims), generator=torch.Generator().manual_seed(1))
    found = heads.focal_cross_entropy(logits[0], mask[:, None], None, 0.0)
    expected = functional.cross_entropy(logits[1], mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    expected.backward()
    torch.testing.assert_close(logits[0].grad, logits[1].grad, rtol=1e-5, atol=1e-9)
