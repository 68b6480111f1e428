"""What an ONNX file holds, before ONNX Runtime parses it: known operators, its own weights, nothing from elsewhere.

The light install has no `onnx`, so this walks over the bytes of the file as Protocol Buffers lay them
(https://protobuf.dev/programming-guides/encoding), by the field numbers of `onnx.proto3`, IR version 10.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from medim.package.contract import PackageError

MAX_GRAPH_BYTES = 1 << 31  # bytes of a graph: the most that Protocol Buffers hold
MAX_FIELDS = 1 << 20  # of all messages; a graph of a thousand layers has a tenth of it
_MAX_DEPTH = 8  # graphs inside one another
_MODEL = {"graph": 7, "opset": 8, "functions": 25}
_OPSET_DOMAIN = 1
_NODE_OF_GRAPH, _INITIALIZER, _SPARSE = 1, 5, 15
_OP, _ATTRIBUTE, _DOMAIN = 4, 5, 7
_VALUE_GRAPHS, _VALUE_TENSORS, _VALUE_SPARSE = {6, 11}, {5, 10}, {22, 23}
_EXTERNAL, _LOCATION = 13, 14
_MAX_FIELD_NUMBER = 1 << 29  # field numbers are below

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
    if len(data) >= MAX_GRAPH_BYTES:
        raise PackageError(
            f"{name}: expected a graph below {MAX_GRAPH_BYTES >> 30} GiB, got {len(data)} bytes. Export it again."
        )
    try:
        _OnnxValidator(name).check_model(memoryview(data))
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise PackageError(f"{name}: cannot load it: not an ONNX file ({error}). Export it again.") from error


@dataclass
class _OnnxValidator:
    """A walk over the messages of a file; what it does not know it passes over, as ONNX Runtime does."""

    name: str
    budget: int = field(default_factory=lambda: MAX_FIELDS)

    def check_model(self, data: memoryview) -> None:
        """Walk through a file from its outermost message.

        Raises:
            PackageError: see `check_graph`.
            IndexError, ValueError: it is no ONNX file.
        """
        graphs = 0
        for number, value in self.iterate_fields(data, _MODEL.values()):
            if number == _MODEL["functions"]:
                raise PackageError(f"{self.name}: expected a graph without functions of its own. Export it again.")
            if number == _MODEL["opset"]:
                for _, domain in self.iterate_fields(value, (_OPSET_DOMAIN,)):
                    self._check_domain(domain)
            if number == _MODEL["graph"]:
                graphs += 1
                self._check_graph(value, 0)
        if graphs != 1:
            raise ValueError(f"{graphs} graphs")

    def _check_graph(self, data: memoryview, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError(f"graphs lie more than {_MAX_DEPTH} deep in one another")
        for number, value in self.iterate_fields(data, (_NODE_OF_GRAPH, _INITIALIZER, _SPARSE)):
            if number == _NODE_OF_GRAPH:
                self._check_node(value, depth)
            elif number == _INITIALIZER:
                self._check_tensor(value)
            else:
                raise PackageError(f"{self.name}: expected dense weights. Export it again.")

    def _check_node(self, data: memoryview, depth: int) -> None:
        operators = []
        for number, value in self.iterate_fields(data, (_OP, _DOMAIN, _ATTRIBUTE)):
            if number == _OP:
                operators.append(bytes(value).decode())
            elif number == _DOMAIN:
                self._check_domain(value)
            else:
                self._check_attribute(value, depth)
        if len(operators) != 1:
            raise ValueError(f"a node of {len(operators)} operators")
        if operators[0] not in OPERATORS:
            raise PackageError(
                f"{self.name}: the operator {operators[0][:40]!r} is not among those that a package may use "
                "(medim.package.onnx_check.OPERATORS). Change the network, or add it there where it is mere arithmetic."
            )

    def _check_attribute(self, data: memoryview, depth: int) -> None:
        for number, value in self.iterate_fields(data, _VALUE_GRAPHS | _VALUE_TENSORS | _VALUE_SPARSE):
            if number in _VALUE_GRAPHS:
                self._check_graph(value, depth + 1)
            elif number in _VALUE_TENSORS:
                self._check_tensor(value)
            else:
                raise PackageError(f"{self.name}: expected dense constants. Export it again.")

    def _check_domain(self, value: memoryview) -> None:
        if (domain := bytes(value).decode()) not in ("", "ai.onnx"):
            raise PackageError(f"{self.name}: expected operators of ONNX alone, got the domain {domain[:40]!r}.")

    def _check_tensor(self, data: memoryview) -> None:
        for number, value in self.iterate_fields(data, (_EXTERNAL,), (_LOCATION,)):
            if number == _EXTERNAL or any(value):
                raise PackageError(f"{self.name}: expected weights inside the file, got a reference to another one.")

    def iterate_fields(
        self, data: memoryview, byte_fields: Collection[int], number_fields: Collection[int] = ()
    ) -> Iterator[tuple[int, memoryview]]:
        """Number and bytes of the fields that are asked for; a number's bytes are those of its varint.

        A field of another wire type than its own is one that Protocol Buffers do not know, and read past: it hides
        nothing from them, but might from this walk, so it is refused. So are tags of more than 32 bits, which they cut.

        Args:
            data: a message.
            byte_fields: fields that hold bytes.
            number_fields: fields that hold a number.

        Raises:
            ValueError: the message ends inside a field, there are too many, or one is of a kind that no ONNX file has.
        """
        place = 0
        while place < len(data):
            self.budget -= 1
            if self.budget < 0:
                raise ValueError(f"more than {MAX_FIELDS} fields")
            key, place = _read_varint(data, place)
            start, number, kind = place, key >> 3, key & 7
            match kind:
                case 0:
                    _, place = _read_varint(data, place)
                case 1:
                    place += 8
                case 2:
                    length, start = _read_varint(data, place)
                    place = start + length
                case 5:
                    place += 4
                case other:
                    raise ValueError(f"wire type {other}")
            if place > len(data):
                raise ValueError("it ends inside a field")
            if (
                not 0 < number < _MAX_FIELD_NUMBER
                or (number in byte_fields and kind != 2)
                or (number in number_fields and kind != 0)
            ):
                raise ValueError(f"a field {number} of wire type {kind}")
            if number in byte_fields or number in number_fields:
                yield number, data[start:place]


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than 10 bytes")
