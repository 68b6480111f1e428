"""Graphs with more than arithmetic on their own weights are refused before ONNX Runtime loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from onnx import TensorProto, helper

from medim.integrity import PackageError
from medim.package import onnx_check
from medim.package.onnx_check import OPERATORS, check_graph
from medim.package.onnx_schema import MESSAGES
from medim.package.package import Package, verify_package, write_sums

IMAGE, OUT = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n"]) for name in ("image", "out"))


def model(*nodes: onnx.NodeProto, **options: Any) -> onnx.ModelProto:
    """A graph from image to out."""
    weights = options.pop("initializer", [])
    made = helper.make_graph(list(nodes), "graph", [IMAGE], [OUT], initializer=weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], **options)


def relu(**options: Any) -> onnx.NodeProto:
    return helper.make_node("Relu", ["image"], ["out"], **options)


def _custom() -> onnx.ModelProto:
    return model(helper.make_node("RunThis", ["image"], ["out"]))


def _domain() -> onnx.ModelProto:
    return model(relu(domain="com.microsoft"))


def _imported_domain() -> onnx.ModelProto:
    made = model(relu())
    made.opset_import.append(helper.make_opsetid("evil.example", 1))
    return made


def _loop() -> onnx.ModelProto:
    body = helper.make_graph([relu()], "body", [IMAGE], [OUT])
    return model(helper.make_node("If", ["image"], ["out"], then_branch=body, else_branch=body))


def _hidden() -> onnx.ModelProto:
    """An operator that only an attribute's graph holds."""
    body = helper.make_graph([helper.make_node("RunThis", ["image"], ["out"])], "body", [IMAGE], [OUT])
    return model(helper.make_node("Relu", ["image"], ["out"], then_branch=body))


def _external() -> onnx.ModelProto:
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1], [1.0])
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    return model(relu(), initializer=[weight])


def _external_constant() -> onnx.ModelProto:
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1], [1.0])
    entry = weight.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    return model(helper.make_node("Constant", [], ["out"], value=weight))


def _function() -> onnx.ModelProto:
    made = model(relu())
    made.functions.append(helper.make_function("mine", "F", ["a"], ["b"], [relu()], [helper.make_opsetid("", 20)]))
    return made


def _sparse() -> onnx.ModelProto:
    made = model(relu())
    values = helper.make_tensor("weight", TensorProto.FLOAT, [1], [1.0])
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, helper.make_tensor("at", TensorProto.INT64, [1], [0]), [3])
    )
    return made


def _training() -> onnx.ModelProto:
    made = model(relu())
    made.training_info.add().algorithm.CopyFrom(made.graph)
    return made


def _device() -> onnx.ModelProto:
    made = model(relu())
    made.graph.node[0].device_configurations.add().configuration_id = "elsewhere"
    return made


HOSTILE = (
    _sparse,
    _training,
    _device,
    _custom,
    _domain,
    _imported_domain,
    _loop,
    _hidden,
    _external,
    _external_constant,
    _function,
)


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_what_is_more_than_arithmetic_on_its_own_weights_is_refused(make: Callable[[], onnx.ModelProto]) -> None:
    check_graph(model(relu()).SerializeToString(), "plain.onnx")
    with pytest.raises(PackageError, match=r"^model\.onnx: ") as raised:
        check_graph(make().SerializeToString(), "model.onnx")
    assert raised.value.exit_code == 3


def message(number: int, *parts: bytes) -> bytes:
    """A field of bytes; a tag beyond 32 bits is written as it is, where Protocol Buffers cut it."""
    body = b"".join(parts)
    return varint(number << 3 | 2) + varint(len(body)) + body


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


NAMES = message(1, b"image") + message(2, b"out")
RELU = NAMES + message(4, b"Relu")
TENSOR = b"\x08\x01\x10\x01" + message(9, bytes(4))
NODE = NAMES + message(4, b"RandomNormalLike")
DISGUISED = {
    "a tag of more than 32 bits": message(7, message(1 << 29 | 1, NODE)),
    "a second name of another wire type": message(7, message(1, RELU, b"\x25Relu")),
    "a second name": message(7, message(1, NODE, message(4, b"Relu"))),
    "a second graph": message(7, message(1, NODE)) + message(7, message(1, RELU)),
    "a length of more bytes than it needs": message(7, message(1, NAMES, b"\x22\x84\x00Relu")),
    "a number in place of a node": message(7, b"\x08\x01", message(1, RELU)),
    "fields in another order": message(7, message(1, message(4, b"Relu"), NAMES)),
    "ONNX Runtime's own format": b"\x08\x80\x01\x00" + b"ORTM" + message(7, message(1, RELU)),
    "an unknown field of the model": message(7, message(1, RELU)) + message(99, b"x"),
    "an unknown field of the graph": message(7, message(1, RELU), message(99, b"x")),
    "an unknown field of a node": message(7, message(1, RELU, message(99, b"x"))),
    "an unknown field of an attribute": message(7, message(1, RELU, message(5, message(99, b"x")))),
    "an unknown field of a tensor": message(7, message(1, RELU), message(5, TENSOR, message(99, b"x"))),
    "no graph": b"\x08\x0a",
}


@pytest.mark.parametrize("what", DISGUISED)
def test_what_onnx_runtime_would_read_otherwise_than_this_check_is_refused(what: str) -> None:
    check_graph(message(7, message(1, RELU), message(5, TENSOR)), "model.onnx")
    with pytest.raises(PackageError, match=r"^model\.onnx: ") as raised:
        check_graph(DISGUISED[what], "model.onnx")
    assert raised.value.exit_code == 3


def test_an_endless_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_check, "MAX_NODES", 1000)
    check_graph(message(7, message(1, RELU) * 1000), "model.onnx")
    with pytest.raises(PackageError, match="at most 1000 nodes"):
        check_graph(message(7, message(1, RELU) * 1001), "model.onnx")


@pytest.mark.parametrize("depth", [1, 10, 200])
def test_graphs_in_one_another_are_refused(depth: int) -> None:
    inner = message(1, RELU)
    for _ in range(depth):
        inner = message(1, NAMES, message(4, b"Relu"), message(5, message(6, inner)))
    with pytest.raises(PackageError, match="graphs in attributes"):
        check_graph(message(7, inner), "model.onnx")


def test_the_schema_is_a_part_of_onnx() -> None:
    theirs = {message.name: message for message in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()}
    theirs |= {"Tensor": onnx.TypeProto.Tensor.DESCRIPTOR, "Dimension": onnx.TensorShapeProto.Dimension.DESCRIPTOR}
    kinds = {"string": "bytes", "enum": "int32"}  # declared in another way, the same bytes
    names = {number: name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}
    for message_name, fields in MESSAGES.items():
        for name, number, kind in map(str.split, fields.split(", ")):
            field = theirs[message_name].fields_by_name[name]
            expected = field.message_type.name if field.message_type else names[field.type]
            mark = ("+" if field.GetOptions().packed else "*") if field.is_repeated else ""
            assert (int(number), kind) == (field.number, kinds.get(expected, expected) + mark), name


def test_a_graph_that_loads_and_cannot_run_is_a_broken_package(copy_of: Callable[[str], Path]) -> None:
    folder = copy_of("encoder")
    path = folder / "models" / "model.onnx"
    made = onnx.load_model(path)
    first = made.graph.node[0]
    sides = [7, 1, *[13] * (len(made.graph.input[0].type.tensor_type.shape.dim) - 2)]  # of no phantom
    made.graph.initializer.append(helper.make_tensor("sides", TensorProto.INT64, [len(sides)], sides))
    made.graph.node.insert(0, helper.make_node("Reshape", [first.input[0], "sides"], ["reshaped"]))
    made.graph.node[1].input[0] = "reshaped"
    path.write_bytes(made.SerializeToString())
    write_sums(folder)
    with pytest.raises(PackageError, match="ONNX Runtime cannot run the graph") as raised:
        verify_package(folder)
    assert raised.value.exit_code == 3


def test_a_package_with_an_operator_of_somebody_else_is_refused_before_it_is_loaded(
    copy_of: Callable[[str], Path],
) -> None:
    folder = copy_of("encoder")
    made = onnx.load_model(folder / "models" / "model.onnx")
    made.graph.node[0].domain = "evil.example"
    (folder / "models" / "model.onnx").write_bytes(made.SerializeToString())
    write_sums(folder)
    with pytest.raises(PackageError, match="operators of ONNX alone"):
        verify_package(folder)


@pytest.mark.parametrize("kind", ["segmenter", "classifier", "encoder"])
def test_damaged_bytes_are_refused_and_never_crash(packages: dict[str, Package], kind: str) -> None:
    data = packages[kind].read_file("models/model.onnx")
    check_graph(data, "model.onnx")
    rng = np.random.default_rng(0)
    for place in (0, 1, 2, 10, len(data) // 2, len(data) - 1):
        with pytest.raises(PackageError):
            check_graph(data[:place], "model.onnx")
    for _ in range(20):
        noise = rng.integers(0, 256, 200, dtype=np.uint8).tobytes()
        with pytest.raises(PackageError):
            check_graph(noise, "model.onnx")


def test_a_graph_beyond_the_limit_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = model(relu()).SerializeToString()
    monkeypatch.setattr(onnx_check, "MAX_FILE_BYTES", len(data))
    with pytest.raises(PackageError, match="below"):
        check_graph(data, "model.onnx")


def test_the_list_holds_operators_of_onnx_and_none_that_runs_other_graphs_or_draws_lots() -> None:
    known = {schema.name: schema for schema in onnx.defs.get_all_schemas()}
    assert set(known) >= OPERATORS
    for name in OPERATORS:
        kinds = {attribute.type for attribute in known[name].attributes.values()}
        assert not kinds & {onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS}
        assert not name.startswith(("Random", "String", "Sequence", "Regex", "Multinomial", "Image"))
