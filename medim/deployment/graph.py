"""What an ONNX file holds, before ONNX Runtime parses it: known operators, its own weights, nothing from elsewhere.

The light install has no `onnx`, so this walks over the bytes of the file as Protocol Buffers lay them
(https://protobuf.dev/programming-guides/encoding), by the field numbers of `onnx.proto3`, IR version 10.
"""

from __future__ import annotations

from collections.abc import Iterator

from medim.deployment.contract import PackageError

LARGEST = 1 << 31  # bytes of a graph: the most that Protocol Buffers hold
_DEEPEST = 8  # graphs inside one another
_MODEL = {"graph": 7, "opset": 8, "functions": 25}
_NODE_OF_GRAPH, _INITIALIZER, _SPARSE = 1, 5, 15
_OP, _ATTRIBUTE, _DOMAIN = 4, 5, 7
_VALUE_GRAPHS, _VALUE_TENSORS, _VALUE_SPARSE = {6, 11}, {5, 10}, {22, 23}
_EXTERNAL, _LOCATION = 13, 14

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
OPERATORS = frozenset(_NAMES.split())  # arithmetic on tensors alone: no loops, no strings, no files, no chance


def check_graph(data: bytes, name: str) -> None:
    """Refuse a graph that is more than arithmetic with weights of its own.

    Args:
        data: the file.
        name: of the file, for errors.

    Raises:
        PackageError: it is too large or no ONNX file, uses an operator that is not in `OPERATORS` or of another domain
            than ONNX's, has functions of its own, or weights in another file.
    """
    if len(data) >= LARGEST:
        raise PackageError(
            f"{name}: expected a graph below {LARGEST >> 30} GiB, got {len(data)} bytes. Export it again."
        )
    try:
        _model(memoryview(data), name)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise PackageError(f"{name}: cannot load it: not an ONNX file ({error}). Export it again.") from error


def _model(data: memoryview, name: str) -> None:
    graphs = 0
    for field, value in _fields(data):
        if field == _MODEL["functions"]:
            raise PackageError(f"{name}: expected a graph without functions of its own. Export it again.")
        if field == _MODEL["opset"]:
            for part, domain in _fields(value):
                if part == 1:
                    _check_domain(domain, name)
        if field == _MODEL["graph"]:
            graphs += 1
            _graph(value, name, 0)
    if graphs != 1:
        raise ValueError(f"{graphs} graphs")


def _graph(data: memoryview, name: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"graphs lie more than {_DEEPEST} deep in one another")
    for field, value in _fields(data):
        if field == _NODE_OF_GRAPH:
            _node(value, name, depth)
        elif field == _INITIALIZER:
            _tensor(value, name)
        elif field == _SPARSE:
            raise PackageError(f"{name}: expected dense weights. Export it again.")


def _node(data: memoryview, name: str, depth: int) -> None:
    operator = ""
    for field, value in _fields(data):
        if field == _OP:
            operator = bytes(value).decode()
        elif field == _DOMAIN:
            _check_domain(value, name)
        elif field == _ATTRIBUTE:
            for part, inner in _fields(value):
                if part in _VALUE_GRAPHS:
                    _graph(inner, name, depth + 1)
                elif part in _VALUE_TENSORS:
                    _tensor(inner, name)
                elif part in _VALUE_SPARSE:
                    raise PackageError(f"{name}: expected dense constants. Export it again.")
    if operator not in OPERATORS:
        raise PackageError(
            f"{name}: the operator {operator[:40]!r} is not among those that a package may use "
            "(medim.deployment.graph.OPERATORS). Change the network, or add it there where it is mere arithmetic."
        )


def _check_domain(value: memoryview, name: str) -> None:
    if (domain := bytes(value).decode()) not in ("", "ai.onnx"):
        raise PackageError(f"{name}: expected operators of ONNX alone, got the domain {domain[:40]!r}.")


def _tensor(data: memoryview, name: str) -> None:
    for field, value in _fields(data):
        if field == _EXTERNAL or (field == _LOCATION and any(value)):
            raise PackageError(f"{name}: expected weights inside the file, got a reference to another one.")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field of a message; a number's bytes are those of its varint.

    Raises:
        ValueError: the message ends inside a field, or holds a wire type that ONNX has no use for.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        start = place
        match key & 7:
            case 0:
                _, place = _varint(data, place)
            case 1:
                place += 8
            case 2:
                length, start = _varint(data, place)
                place = start + length
            case 5:
                place += 4
            case other:
                raise ValueError(f"wire type {other}")
        if place > len(data):
            raise ValueError("it ends inside a field")
        yield key >> 3, data[start:place]


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 10 bytes")
