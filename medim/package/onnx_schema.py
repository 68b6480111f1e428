"""Protocol Buffers descriptors of the ONNX messages and fields that a package's graph may contain.

The field numbers are those of `onnx.proto` (https://github.com/onnx/onnx, IR version 14). Fields that a package may not
contain are missing: functions, graphs in attributes, sparse tensors, tensors in other files, training, devices. To the
parser they are unknown fields. Text is declared as bytes and an enumeration as int32: the wire format is the same.

`protobuf` (2 MB) is a requirement of ONNX Runtime, so the light install has it. The `onnx` package contains the same
descriptors, but takes 31 MB.
"""

from __future__ import annotations

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

MESSAGES = {  # fields as "name number type"; * repeated, + repeated and packed
    "StringStringEntryProto": "key 1 bytes, value 2 bytes",
    "Dimension": "dim_value 1 int64, dim_param 2 bytes, denotation 3 bytes",
    "TensorShapeProto": "dim 1 Dimension*",
    "Tensor": "elem_type 1 int32, shape 2 TensorShapeProto",
    "TypeProto": "tensor_type 1 Tensor, denotation 6 bytes",
    "ValueInfoProto": "name 1 bytes, type 2 TypeProto, doc_string 3 bytes, metadata_props 4 StringStringEntryProto*",
    "TensorProto": "dims 1 int64*, data_type 2 int32, float_data 4 float+, int32_data 5 int32+, int64_data 7 int64+, "
    "name 8 bytes, raw_data 9 bytes, double_data 10 double+, uint64_data 11 uint64+, doc_string 12 bytes, "
    "metadata_props 16 StringStringEntryProto*",
    "AttributeProto": "name 1 bytes, f 2 float, i 3 int64, s 4 bytes, t 5 TensorProto, floats 7 float*, ints 8 int64*, "
    "strings 9 bytes*, tensors 10 TensorProto*, doc_string 13 bytes, type 20 int32",
    "NodeProto": "input 1 bytes*, output 2 bytes*, name 3 bytes, op_type 4 bytes, attribute 5 AttributeProto*, "
    "doc_string 6 bytes, domain 7 bytes, metadata_props 9 StringStringEntryProto*",
    "GraphProto": "node 1 NodeProto*, name 2 bytes, initializer 5 TensorProto*, doc_string 10 bytes, "
    "input 11 ValueInfoProto*, output 12 ValueInfoProto*, value_info 13 ValueInfoProto*, "
    "metadata_props 16 StringStringEntryProto*",
    "OperatorSetIdProto": "domain 1 bytes, version 2 int64",
    "ModelProto": "ir_version 1 int64, producer_name 2 bytes, producer_version 3 bytes, domain 4 bytes, "
    "model_version 5 int64, doc_string 6 bytes, graph 7 GraphProto, opset_import 8 OperatorSetIdProto*, "
    "metadata_props 14 StringStringEntryProto*",
}
_PACKAGE = "medim.onnx"
_SCALARS = {"double": 1, "float": 2, "int64": 3, "uint64": 4, "int32": 5, "bytes": 12}  # FieldDescriptorProto.Type
_MESSAGE_TYPE, _OPTIONAL, _REPEATED = 11, 1, 3


@functools.cache
def build_model_class() -> Any:
    """Build the class of `ModelProto`, in a descriptor pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(name="medim/onnx.proto", package=_PACKAGE, syntax="proto2")
    for message, fields in MESSAGES.items():
        descriptor = file.message_type.add(name=message)
        for name, number, kind in map(str.split, fields.split(", ")):
            element = kind.rstrip("*+")
            label = _OPTIONAL if kind == element else _REPEATED
            field = descriptor.field.add(name=name, number=int(number), label=label)
            field.type = _SCALARS.get(element, _MESSAGE_TYPE)
            if field.type == _MESSAGE_TYPE:
                field.type_name = f".{_PACKAGE}.{element}"
            field.options.packed = kind.endswith("+")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.ModelProto"))
