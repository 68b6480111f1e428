"""A graph under ONNX Runtime, on the CPU, held to the inputs and outputs of its contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medim.package.contract import GRAPH, PackageError, Signature
from medim.package.onnx_check import check_graph
from medim.types import Array


@dataclass(frozen=True, eq=False)
class OnnxSession:
    """A network ready to run.

    Attributes:
        engine: the graph in ONNX Runtime.
        signature: its inputs and outputs.
    """

    engine: Any
    signature: Signature

    def __call__(self, image: Array) -> Array:
        """The first output for (N, C, ...).

        Raises:
            UserError: an input outside the contract.
        """
        return self._run_outputs(image, [0])[0]

    def predict_with_features(self, image: Array) -> tuple[Array, Array]:
        """The first output, the answer, and the last, what the guard watches."""
        answer, features = self._run_outputs(image, [0, -1])
        return answer, features

    def _run_outputs(self, image: Array, indices: Sequence[int]) -> list[Array]:
        self.signature.check_shape(image.shape)
        names = [self.signature.outputs[output_index].name for output_index in indices]
        try:
            arrays = self.engine.run(names, {self.signature.inputs[0].name: np.ascontiguousarray(image, np.float32)})
        except Exception as error:  # its exceptions have no common public base
            raise PackageError(
                f"{GRAPH}: ONNX Runtime cannot run it ({type(error).__name__}). Export it again."
            ) from error
        return [np.asarray(array) for array in arrays]


def load_onnx_session(graph: bytes, signature: Signature, *, name: str = GRAPH, threads: int = 2) -> OnnxSession:
    """A network under ONNX Runtime (CPU).

    Args:
        graph: the bytes of an ONNX file that carries its own weights.
        signature: its inputs and outputs.
        name: of the file, for errors.
        threads: that one run may use.

    Raises:
        PackageError: it holds more than arithmetic (see `check_graph`), ONNX Runtime cannot load it, or its inputs and
            outputs are not those of the signature.
    """
    import onnxruntime

    check_graph(graph, name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never its own format, by a magic number
    try:
        engine = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common public base
        raise PackageError(f"{name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({error}).") from error
    actual = [[(t.name, len(t.shape)) for t in tensors] for tensors in (engine.get_inputs(), engine.get_outputs())]
    expected = [[(t.name, len(t.shape)) for t in tensors] for tensors in (signature.inputs, signature.outputs)]
    if actual != expected:
        raise PackageError(
            f"{name}: expected inputs and outputs {expected} (name, dimensions), got {actual}. Export it again."
        )
    return OnnxSession(engine, signature)
