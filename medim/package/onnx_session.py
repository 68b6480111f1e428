"""ONNX Runtime session on the CPU that enforces the inputs and outputs of a contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medim.integrity import PackageError
from medim.package.contract import GRAPH, Signature
from medim.package.onnx_check import check_graph
from medim.types import Array


@dataclass(frozen=True, eq=False)
class OnnxSession:
    """Network in ONNX Runtime.

    Attributes:
        engine: ONNX Runtime inference session.
        signature: inputs and outputs of the network.
    """

    engine: Any
    signature: Signature

    def __call__(self, image: Array) -> Array:
        """Compute the first output for a batch (N, C, ...).

        Raises:
            UserError: the shape of the input is outside the contract.
        """
        return self._run_outputs(image, [0])[0]

    def predict_with_features(self, image: Array) -> tuple[Array, Array]:
        """Compute the first output (the prediction) and the last output (the OOD features)."""
        answer, features = self._run_outputs(image, [0, -1])
        return answer, features

    def _run_outputs(self, image: Array, indices: Sequence[int]) -> list[Array]:
        self.signature.check_shape(image.shape)
        names = [self.signature.outputs[output_index].name for output_index in indices]
        try:
            arrays = self.engine.run(names, {self.signature.inputs[0].name: np.ascontiguousarray(image, np.float32)})
        except Exception as error:  # the exceptions of ONNX Runtime have no public base class
            raise PackageError(
                f"{GRAPH}: ONNX Runtime cannot run the graph ({type(error).__name__}). Export the package again."
            ) from error
        return [np.asarray(array) for array in arrays]


def load_onnx_session(graph: bytes, signature: Signature, *, name: str = GRAPH, threads: int = 2) -> OnnxSession:
    """Load an ONNX graph in ONNX Runtime on the CPU.

    Args:
        graph: bytes of an ONNX file with embedded weights.
        signature: expected inputs and outputs.
        name: file name for error messages.
        threads: number of threads per run.

    Raises:
        PackageError: the graph contains operators that are not allowed (see `check_graph`), ONNX Runtime cannot load
            it, or its inputs and outputs differ from the signature.
    """
    import onnxruntime

    check_graph(graph, name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # do not accept the ORT format
    try:
        engine = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of ONNX Runtime have no public base class
        raise PackageError(f"{name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({error}).") from error
    actual = [[(t.name, len(t.shape)) for t in tensors] for tensors in (engine.get_inputs(), engine.get_outputs())]
    expected = [[(t.name, len(t.shape)) for t in tensors] for tensors in (signature.inputs, signature.outputs)]
    if actual != expected:
        raise PackageError(
            f"{name}: expected inputs and outputs {expected} (name, dimensions), got {actual}. Export again."
        )
    return OnnxSession(engine, signature)
