from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from medim.export.onnx import InputSizes, build_signature, probe_input_sizes, strip_weights, to_onnx
from medim.models.encoders.convnet import ConvNet
from medim.models.model import build_encoder, build_model
from medim.models.ood_features import WithOODFeatures
from medim.package.contract import Signature, Symbol, TensorSpec
from medim.types import Array, UserError
from tests.export.packages import SPECS
from tests.specs import make_spec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="image", shape=("batch", 1, "H", "W")),),
    outputs=(TensorSpec(name="logits", shape=("batch", 3, "H", "W")),),
    symbols={"batch": Symbol(), "H": Symbol(minimum=2, multiple_of=2), "W": Symbol(minimum=2, multiple_of=2)},
)


def network(norm: type[nn.Module]) -> nn.Module:
    """Two normalised convolutions; the second norm sees next to no variance where the image has none."""
    torch.manual_seed(0)
    norms = [nn.GroupNorm(4, 8) if norm is nn.GroupNorm else norm(8, affine=True) for _ in range(2)]
    layers = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        norms[0],
        nn.LeakyReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        norms[1],
        nn.Conv2d(8, 3, 1),
    )
    for parameter in layers.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return layers.eval()


def answer(graph: bytes, image: Array) -> Array:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": image})[0])


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.GroupNorm])
def test_norms_are_exact_on_images_that_hardly_vary_at_any_size(norm: type[nn.Module]) -> None:
    made = network(norm)
    graph = to_onnx(made, InputSizes((8, 8), 2, 2, fixed=False), SIGNATURE)
    operations = {node.op_type for node in onnx.load_model_from_string(graph).graph.node}
    assert "InstanceNormalization" not in operations
    assert "GroupNormalization" not in operations
    exact = copy.deepcopy(made).double()
    flat = np.full((3, 1, 14, 22), -0.7, np.float32)
    for image in (np.zeros((1, 1, 16, 4), np.float32), flat):
        with torch.no_grad():
            want = exact(torch.from_numpy(image).double()).numpy()
        np.testing.assert_allclose(answer(graph, image), want, atol=3e-6)  # ONNX Runtime's own norm: 1.4e-5 here


def test_a_graph_holds_no_trace_of_where_it_was_made() -> None:
    graph = to_onnx(nn.Conv2d(1, 3, 3, padding=1), InputSizes((8, 8), 2, 2, fixed=False), SIGNATURE)
    model = onnx.load_model_from_string(graph)
    assert b"/" not in strip_weights(graph).replace(b"pkg.torch", b"")
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert len(strip_weights(graph)) < len(graph)


def test_which_sizes_a_network_takes_is_found_out_by_trying() -> None:
    flat = ConvNet(1, 2, (32, 32), channels=(4, 8), hidden=8, summary_channels=4).eval()
    pooled = ConvNet(1, 2, (32, 32), channels=(4, 8), hidden=8, summary_channels=4, summary="mean_max").eval()
    assert probe_input_sizes(flat, (32, 32), flat.strides, 1) == InputSizes((32, 32), 4, 4, fixed=True)
    assert probe_input_sizes(pooled, (30, 30), pooled.strides, 1) == InputSizes((30, 30), 4, 1, fixed=False, minimum=4)
    joined = build_model(make_spec({**SPECS["segmenter"], "in_channels": 1})).eval()
    assert probe_input_sizes(joined, (16, 24, 16), (1, 2), 1) == InputSizes((16, 24, 16), 2, 2, fixed=False, minimum=4)


ANY_SIZE = {"summary": "mean_max", "hidden": 0}
ENCODERS_2D = {
    "convnet": ({"channels": [4, 8], "stride": 1, "padding": 0, "first_norm": False, **ANY_SIZE}, 16, 8),
    "alexnet": ({"channels": [4, 4, 4, 4, 4], **ANY_SIZE}, 24, 16),
    "resnet": ({"widths": [4, 4], "blocks": [1, 1], "norm": "gn", **ANY_SIZE}, 16, 8),
    "amdim": ({"width": 4, "depth": 1, "summary_channels": 16}, 40, 32),
    "patches": ({"patch": 8, "encoder": {"name": "convnet", "channels": [4], "norm": "none", "hidden": 0}}, 16, 8),
}


@pytest.mark.parametrize(
    "name", [n if n == "patches" else pytest.param(n, marks=pytest.mark.slow) for n in ENCODERS_2D]
)
def test_an_exported_encoder_takes_every_size_from_its_smallest_on(name: str) -> None:
    options, side, smallest = ENCODERS_2D[name]
    torch.manual_seed(0)
    encoder: Any = build_encoder(
        make_spec(
            {"encoder": {"name": name, **options}, "in_channels": 1, "spatial_dims": 2, "input_shape": (side, side)}
        )
    )
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    made = WithOODFeatures(encoder.eval()).eval()
    sizes = probe_input_sizes(made, (side, side), encoder.strides, 1)
    assert (sizes.minimum, sizes.multiple_of, sizes.fixed) == (smallest, 1, False)
    signature = build_signature(made, sizes, 1, encoder.strides)
    graph = onnxruntime.InferenceSession(to_onnx(made, sizes, signature), providers=["CPUExecutionProvider"])
    for shape in ((smallest, smallest), *sizes.untraced_shapes()):
        image = torch.randn(3, 1, *shape)
        with torch.no_grad():
            want = made(image)
        for ours, theirs in zip(graph.run(None, {"image": image.numpy()}), want, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5 * max(1.0, float(theirs.abs().max())))


def test_a_network_that_cannot_be_exported_is_told_without_a_wall_of_text() -> None:
    class Stubborn(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image if image.sum() > 0 else -image

    with pytest.raises(UserError, match="cannot export"):
        to_onnx(Stubborn(), InputSizes((8, 8), 2, 2, fixed=False), SIGNATURE)


def test_a_network_that_fixes_a_side_as_it_was_traced_is_told_apart() -> None:
    class Counts(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.expand(-1, 3, -1, -1) + torch.arange(len(image))[:, None, None, None]

    with pytest.raises(UserError, match="constant length of batch"):
        to_onnx(Counts(), InputSizes((8, 8), 2, 2, fixed=False), SIGNATURE)
