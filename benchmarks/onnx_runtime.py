"""Claim: the graph of a package in ONNX Runtime needs no more time and memory than the network in torch.

The network of each preset, with random weights, is run on one image. Times are measured for the graph of the package
(norms in float64), for the graph with the norms of ONNX Runtime, and for the former with the out-of-distribution
features as a second output. Ratios are relative to torch: alternating calls in one process with one thread, median of
several rounds. Memory is measured in a new process per network: peak of the process, and increase by one call.

    OMP_NUM_THREADS=1 python benchmarks/onnx_runtime.py --out onnx_runtime.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CASES = {  # preset: task and modality
    "xray-28-classification": ("classification", "xray"),
    "xray-classification": ("classification", "xray"),
    "mri-crop-segmentation": ("segmentation", "mri"),
    "mri-segmentation": ("segmentation", "mri"),
}
MIN_SECONDS = 0.3  # minimum duration of one timing of torch
OWN, EXACT = "own norms.onnx", "exact norms.onnx"


def main() -> None:
    """Measure all networks; print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("onnx_runtime.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=2, metavar=("FOLDER", "RUNTIME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(measure_memory(Path(arguments.memory[0]), arguments.memory[1])))
        return
    from medim.files import write_json

    rows = {preset: measure_network(preset, *case, rounds=arguments.rounds) for preset, case in CASES.items()}
    write_json(arguments.out, {"schema_version": 1, "threads": 1, "networks": rows})


def measure_network(preset: str, task: str, modality: Any, *, rounds: int) -> dict[str, Any]:
    """Measure the ratios of a network; weights and both graphs are in one temporary folder."""
    import torch
    from timing import format_ratio, measure_ratios, time_function

    from medim.export.onnx import build_signature, probe_input_sizes, to_onnx
    from medim.model_spec import ModelSpec
    from medim.models.model import as_numpy_function, build_model
    from medim.models.ood_features import WithOODFeatures
    from medim.models.serialization import save_model
    from medim.package.onnx_session import load_onnx_session
    from medim.training.finetune.config import resolve_finetune_config

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = resolve_finetune_config(task, modality, None, preset)
    sides = tuple(config.views.shape)
    spec = ModelSpec(
        kind=task,
        modality=modality,
        encoder=config.encoder,
        decoder=config.decoder,
        head=config.head,
        in_channels=1,
        out_channels=3,
        spatial_dims=len(sides),
        input_shape=sides,
        preprocessing=tuple(config.preprocessing),
    )
    model: Any = build_model(spec).eval()
    model_with_features = WithOODFeatures(model).eval()
    sizes = probe_input_sizes(model_with_features, sides, tuple(model.encoder.strides), 1)
    signature = build_signature(model_with_features, sizes, 1, tuple(model.encoder.strides))
    image = np.random.default_rng(0).standard_normal((1, 1, *sides)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder, "model", model, spec)
        np.save(folder / "image.npy", image)
        (folder / "signature.json").write_text(signature.model_dump_json())
        for file in (OWN, EXACT):
            (folder / file).write_bytes(to_onnx(model_with_features, sizes, signature, exact_norms=file == EXACT))
        own, exact = (load_onnx_session((folder / file).read_bytes(), signature, threads=1) for file in (OWN, EXACT))
        run = as_numpy_function(model)
        calls: dict[str, Callable[[], object]] = {
            "torch": lambda: run(image),
            "exact norms": lambda: exact(image),
            "own norms": lambda: own(image),
            "exact norms and OOD detector": lambda: exact.predict_with_features(image),
        }
        calls["torch"]()
        repeats = max(1, round(MIN_SECONDS / time_function(calls["torch"])))
        time_ratios = measure_ratios({name: _repeat_call(call, repeats) for name, call in calls.items()}, rounds)
        memory_by_runtime = {runtime: _measure_in_process(folder, runtime) for runtime in ("torch", OWN, EXACT)}
    memory_ratios = {
        runtime.removesuffix(".onnx"): {
            key: memory_by_runtime[runtime][key] / memory_by_runtime["torch"][key] for key in ("peak", "added")
        }
        for runtime in (OWN, EXACT)
    }
    print(
        f"{preset} {list(sides)}",
        {name: format_ratio(ratio) for name, ratio in time_ratios.items()},
        memory_ratios,
        flush=True,
    )
    return {
        "image": list(sides),
        "time_over_torch": time_ratios,
        "memory_over_torch": memory_ratios,
        "bytes": memory_by_runtime,
    }


def _repeat_call(call: Callable[[], object], repeats: int) -> Callable[[], None]:
    def run_repeats() -> None:
        for _ in range(repeats):
            call()

    return run_repeats


def measure_memory(folder: Path, runtime: str) -> dict[str, int]:
    """Measure memory in bytes: peak of this process, and increase by one call."""
    image = np.load(folder / "image.npy")
    run: Any
    if runtime == "torch":
        import torch

        from medim.models.model import as_numpy_function
        from medim.models.serialization import load_model

        torch.set_num_threads(1)
        run = as_numpy_function(load_model(folder)[0])
    else:
        from medim.package.contract import Signature
        from medim.package.onnx_session import load_onnx_session

        signature = Signature.model_validate_json((folder / "signature.json").read_bytes())
        run = load_onnx_session((folder / runtime).read_bytes(), signature, threads=1)
    before = _read_status_bytes("VmRSS")
    run(image)
    return {"peak": _read_status_bytes("VmHWM"), "added": _read_status_bytes("VmHWM") - before}


def _measure_in_process(folder: Path, runtime: str) -> dict[str, int]:
    process = subprocess.run(
        [sys.executable, __file__, "--memory", str(folder), runtime], capture_output=True, text=True, check=True
    )
    usage: dict[str, int] = json.loads(process.stdout)
    return usage


def _read_status_bytes(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
