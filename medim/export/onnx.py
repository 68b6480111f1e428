"""Convert a torch network to one ONNX file with variable input sizes, exact norms and no data of this machine."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import torch
from torch import nn
from torch.export import Dim

from medim.models.ood_features import WithOODFeatures
from medim.package.contract import Signature, Symbol, TensorSpec
from medim.types import UserError

OPSET = 20
AXES = ("D", "H", "W")


def replace_instance_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace each InstanceNormalization by nodes that compute mean and variance in float64.

    GroupNorm is exported as InstanceNormalization, too. The implementation of ONNX Runtime loses up to three digits in
    windows of low contrast; float64 agrees with torch for all inputs.
    """
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _expand_instance_norm(node) if node.op_type == "InstanceNormalization" else [node]
    if len(nodes) > len(model.graph.node):
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(value, name) for name, value in _NORM_CONSTANTS.items()
        )
    return model


_NORM_CONSTANTS = {"norm.flat": np.array([0, 0, -1]), "norm.last": np.array([2]), "norm.column": np.array([1])}


def _expand_instance_norm(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Build the nodes of (x - mean) / sqrt(variance + epsilon) * scale + bias over the flattened spatial axes."""
    (x, scale, bias), (out,) = node.input, node.output
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    new_nodes: list[onnx.NodeProto] = []

    def add_node(op: str, name: str, *inputs: str, **options: Any) -> str:
        new_nodes.append(onnx.helper.make_node(op, inputs, [name if name == out else f"{out}.{name}"], **options))
        return str(new_nodes[-1].output[0])

    values = add_node(
        "Reshape", "values", add_node("Cast", "float64", x, to=onnx.TensorProto.DOUBLE), "norm.flat"
    )  # (N, C, L)
    deviations = add_node("Sub", "centred", values, add_node("ReduceMean", "mean", values, "norm.last"))
    variance = add_node("ReduceMean", "variance", add_node("Mul", "square", deviations, deviations), "norm.last")
    floor = onnx.helper.make_tensor("epsilon", onnx.TensorProto.DOUBLE, [], [epsilon])
    spread = add_node(
        "Sqrt", "spread", add_node("Add", "padded", variance, add_node("Constant", "epsilon", value=floor))
    )
    unit = add_node("Cast", "unit", add_node("Div", "ratio", deviations, spread), to=onnx.TensorProto.FLOAT)
    scale_product = add_node("Mul", "scaled", unit, add_node("Unsqueeze", "scale", scale, "norm.column"))
    bias_sum = add_node("Add", "shifted", scale_product, add_node("Unsqueeze", "bias", bias, "norm.column"))
    add_node("Reshape", out, bias_sum, add_node("Shape", "shape", x))
    return new_nodes


@dataclass(frozen=True)
class InputSizes:
    """Input sizes that a network accepts.

    Attributes:
        shape: spatial shape of the training images.
        stride: largest stride of the network.
        multiple_of: required divisor of each axis length: the stride if a decoder concatenates maps, otherwise 1.
        fixed: whether the network accepts only `shape`.
        minimum: axis length from which the network accepts all sizes.
    """

    shape: tuple[int, ...]
    stride: int
    multiple_of: int
    fixed: bool
    minimum: int = 1

    def untraced_shapes(self) -> list[tuple[int, ...]]:
        """List input shapes that were not used for tracing; if sizes are variable, the axes differ in length."""
        if self.fixed:
            return [self.shape]
        remainder = 0 if self.multiple_of > 1 else min(3, self.stride - 1)  # voxels beyond a multiple of the stride
        minimum = -(-self.minimum // self.stride) * self.stride
        stride_counts = ((2, 3, 1), (4, 1, 2), (1, 5, 3))
        return [
            tuple(minimum + self.stride * n + remainder for n in sides[: len(self.shape)]) for sides in stride_counts
        ]


def probe_input_sizes(
    network: nn.Module, shape: tuple[int, ...], strides: tuple[int, ...], in_channels: int
) -> InputSizes:
    """Determine the input sizes that a network accepts by running it on test inputs.

    Args:
        network: network in evaluation mode.
        shape: spatial shape of the training images.
        strides: strides of the feature maps.
        in_channels: number of image channels.
    """
    stride = max(strides)
    for multiple in (1, stride):
        rounded_shape = [-(-n // multiple) * multiple for n in shape]
        remainder = 1 if multiple == 1 else 0  # a multiple of the stride would not reveal a floor division
        trial_shape = tuple(n + (1 + axis) * stride + remainder for axis, n in enumerate(rounded_shape))
        if _accepts_shape(network, in_channels, trial_shape) and (multiple == 1 or list(shape) == rounded_shape):
            return InputSizes(
                shape, stride, multiple, fixed=False, minimum=_find_minimum_side(network, in_channels, shape, stride)
            )
    return InputSizes(shape, stride, stride, fixed=True)


def _find_minimum_side(network: nn.Module, in_channels: int, shape: tuple[int, ...], stride: int) -> int:
    """Find a minimum axis length: 1, 2, 4, ... strides, or the shortest axis of the training shape."""
    side = stride
    while side < min(shape) and not _accepts_shape(network, in_channels, (side,) * len(shape)):
        side *= 2
    return min(side, *shape)


def _accepts_shape(network: nn.Module, in_channels: int, shape: tuple[int, ...]) -> bool:
    try:
        with torch.inference_mode():
            network(torch.zeros(1, in_channels, *shape))
    except (RuntimeError, ValueError):  # a linear layer, a kernel or concatenated maps do not fit the size
        return False
    return True


def build_signature(network: nn.Module, sizes: InputSizes, in_channels: int, strides: tuple[int, ...]) -> Signature:
    """Build the signature of a network: names and shapes of input and outputs, and limits of the axis lengths."""
    sides: tuple[int | str, ...] = sizes.shape if sizes.fixed else AXES[-len(sizes.shape) :]
    symbols = {"batch": Symbol()}
    if not sizes.fixed:
        symbols |= {side: Symbol(minimum=sizes.minimum, multiple_of=sizes.multiple_of) for side in map(str, sides)}
    with torch.inference_mode():
        outputs = _as_tuple(network(torch.zeros(2, in_channels, *sizes.shape)))
    tensors = []
    for i, out in enumerate(outputs):
        name = network.outputs[i] if isinstance(network, WithOODFeatures) else "logits"
        grid: tuple[int | str, ...] = tuple(out.shape[2:])
        if not sizes.fixed and grid:
            stride = strides[i - 1] if i else 1
            grid = tuple(side if stride == 1 else f"{side}/{stride}" for side in sides)
        tensors.append(TensorSpec(name=name, dtype=_name_dtype(out), shape=("batch", out.shape[1], *grid)))
    return Signature(
        inputs=(TensorSpec(name="image", shape=("batch", in_channels, *sides)),),
        outputs=tuple(tensors),
        symbols=symbols,
    )


def _name_dtype(output: torch.Tensor) -> Literal["float32", "float64"]:
    return "float64" if output.dtype == torch.float64 else "float32"


def build_score_signature(signature: Signature) -> Signature:
    """Build the signature of a score map: the same input, and one score per voxel as output."""
    sides = signature.inputs[0].shape[2:]
    return signature.model_copy(update={"outputs": (TensorSpec(name="scores", shape=("batch", 1, *sides)),)})


def to_onnx(network: nn.Module, sizes: InputSizes, signature: Signature, *, exact_norms: bool = True) -> bytes:
    """Export a network in evaluation mode to ONNX.

    Args:
        network: module that maps an image (N, C, ...) to one tensor or a tuple of tensors.
        sizes: accepted input sizes; the batch size is always variable.
        signature: names of input and outputs.
        exact_norms: see `replace_instance_norms`; packages require it.

    Returns:
        Bytes of the ONNX file with embedded weights. They are deterministic and contain no stack traces or paths.

    Raises:
        UserError: torch cannot export this network with these sizes, or makes a variable axis length constant.
    """
    # The tracer treats an axis of one cell as constant.
    grid = sizes.shape if sizes.fixed else tuple(max(n, 2 * sizes.stride) for n in sizes.shape)
    image = torch.zeros(2, int(signature.inputs[0].shape[1]), *grid)
    dynamic_dims: dict[int, Any] = {0: Dim("batch", min=1)}
    if not sizes.fixed:
        for axis, side in enumerate(signature.inputs[0].shape[2:], start=2):
            min_cells = -(-sizes.minimum // sizes.multiple_of)
            cells = Dim(f"{side}_cells", min=min_cells)  # multiples avoid nodes in the graph that pad odd axis lengths
            dynamic_dims[axis] = sizes.multiple_of * cells if sizes.multiple_of > 1 else cells
    try:
        with _silence_exporter(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (image,),
                dynamo=True,
                dynamic_shapes=(dynamic_dims,),
                opset_version=OPSET,
                external_data=False,
                input_names=[t.name for t in signature.inputs],
                output_names=[t.name for t in signature.outputs],
                verbose=False,
            )
    except Exception as error:  # the exception classes of torch.onnx differ between versions
        raise UserError(
            f"ONNX export: torch {torch.__version__} cannot export this network ({_last_line(error)})."
        ) from error
    if program is None:
        raise UserError(f"ONNX export: torch {torch.__version__} returned no program for this network.")
    model = strip_metadata(program.model_proto)
    if exact_norms:
        model = replace_instance_norms(model)
    onnx.checker.check_model(model, full_check=True)
    graph_dims = model.graph.input[0].type.tensor_type.shape.dim
    sides = zip(signature.inputs[0].shape, graph_dims, strict=True)
    if fixed_sides := [side for side, dim in sides if isinstance(side, str) and dim.HasField("dim_value")]:
        raise UserError(
            f"ONNX export: the traced network has a constant length of {', '.join(fixed_sides)}, which must vary. "
            "In its forward method, use x.shape[0] instead of len(x), and no loop over a number of voxels."
        )
    return bytes(model.SerializeToString(deterministic=True))


def strip_metadata(model: onnx.ModelProto) -> onnx.ModelProto:
    """Remove metadata about the origin of a graph: properties and documentation strings of all elements."""
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info, *graph.initializer, *graph.node, *model.functions]
    for function in model.functions:
        values += [*function.node, *function.value_info]
    for message in [model, graph, *values]:
        message.ClearField("metadata_props")
        message.ClearField("doc_string")
    return model


def strip_weights(graph: bytes) -> bytes:
    """Remove the weights of a graph, so that the privacy scan reads only the parts that can contain text."""
    model = onnx.load_model_from_string(graph)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return bytes(model.SerializeToString(deterministic=True))


@contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppress messages of the exporter about packages that medim does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _as_tuple(out: Any) -> tuple[torch.Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
