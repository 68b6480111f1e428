"""Check of an ONNX file before ONNX Runtime loads it: allowed operators and fields, weights inside the file.

The file must equal its own serialisation after a parse with the fields of `medim.package.onnx_schema`. So it has no
other fields, and nothing that ONNX Runtime, which parses the file again, could read in another way: no field of another
wire type, no second value of a single field, no overlong number.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from medim.integrity import MAX_FILE_BYTES, PackageError
from medim.package.onnx_schema import build_model_class

MAX_NODES = 1 << 17  # a graph of a thousand layers has a tenth of it

_NAMES = """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax LpNormalization LpPool LRN MatMul Max MaxPool Mean MeanVarianceNormalization Min
    Mish Mod Mul Neg Not OneHot Or Pad Pow PRelu Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round ScatterElements
    ScatterND Selu Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum
    Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_NAMES.split())  # tensor arithmetic only: no loops, no strings, no files, no random numbers


def check_graph(data: bytes, name: str) -> None:
    """Refuse a graph that is more than arithmetic with weights of its own.

    Args:
        data: Content of the file.
        name: Name of the file, for errors.

    Raises:
        PackageError: The file is too large or no ONNX file, has an operator that is not in `OPERATORS` or of another
            domain than ONNX's, or fields that a package's graph may not have.
    """
    if len(data) >= MAX_FILE_BYTES:
        raise PackageError(
            f"{name}: expected a graph below {MAX_FILE_BYTES >> 30} GiB, got {len(data)} bytes. Export it again."
        )
    try:
        model = build_model_class().FromString(data)
    except (DecodeError, MemoryError) as error:
        raise PackageError(f"{name}: cannot load it: not an ONNX file ({error}). Export it again.") from error
    nodes = model.graph.node
    if len(nodes) > MAX_NODES:
        raise PackageError(f"{name}: expected at most {MAX_NODES} nodes, got {len(nodes)}. Export it again.")
    for domain in sorted({message.domain for message in (*model.opset_import, *nodes)} - {b"", b"ai.onnx"}):
        got = domain.decode(errors="replace")[:40]
        raise PackageError(f"{name}: expected operators of ONNX alone, got the domain {got!r}.")
    for operator in sorted({node.op_type.decode(errors="replace") for node in nodes} - OPERATORS):
        raise PackageError(
            f"{name}: the operator {operator[:40]!r} is not among those that a package may use "
            "(medim.package.onnx_check.OPERATORS). Change the network, or add it there where it is mere arithmetic."
        )
    model.DiscardUnknownFields()
    if not nodes or model.SerializeToString(deterministic=True) != data:
        raise PackageError(
            f"{name}: not an ONNX file that a package may contain: it has no nodes, or fields that "
            "medim.package.onnx_schema does not list (functions, graphs in attributes, sparse or external weights), or "
            "its encoding is not canonical. Export it again."
        )
