"""A graph with anything but arithmetic on its own weights is refused before ONNX Runtime parses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from medim.deployment import graph
from medim.deployment.contract import PackageError
from medim.deployment.graph import OPERATORS, check_graph
from medim.deployment.package import Package, verify, write_sums

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


HOSTILE = (_custom, _domain, _imported_domain, _loop, _hidden, _external, _external_constant, _function)


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_what_is_more_than_arithmetic_on_its_own_weights_is_refused(make: Callable[[], onnx.ModelProto]) -> None:
    check_graph(model(relu()).SerializeToString(), "plain.onnx")
    with pytest.raises(PackageError, match=r"^model\.onnx: ") as raised:
        check_graph(make().SerializeToString(), "model.onnx")
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
        verify(folder)


@pytest.mark.parametrize("kind", ["segmenter", "classifier", "encoder"])
def test_damaged_bytes_are_refused_and_never_crash(packages: dict[str, Package], kind: str) -> None:
    data = packages[kind].read("models/model.onnx")
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
    monkeypatch.setattr(graph, "LARGEST", len(data))
    with pytest.raises(PackageError, match="below"):
        check_graph(data, "model.onnx")


def test_the_list_holds_operators_of_onnx_and_none_that_runs_other_graphs_or_draws_lots() -> None:
    known = {schema.name: schema for schema in onnx.defs.get_all_schemas()}
    assert set(known) >= OPERATORS
    for name in OPERATORS:
        kinds = {attribute.type for attribute in known[name].attributes.values()}
        assert not kinds & {onnx.defs.OpSchema.AttrType.GRAPH, onnx.defs.OpSchema.AttrType.GRAPHS}
        assert not name.startswith(("Random", "String", "Sequence", "Regex", "Multinomial", "Image"))
