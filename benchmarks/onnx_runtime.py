"""Claim: a package's graph under ONNX Runtime costs no more time and memory than the network under torch.

For the network of each preset, with fresh weights, on one image: seconds of a graph as the package holds it (norms in
float64), of the graph with ONNX Runtime's own norms, and of the former with what the out-of-distribution guard watches,
over those of torch; in turn, in one process, one thread, median of several rounds. Memory is that of a fresh process a
network: the peak of the whole process, and what one call adds.

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

CASES = {  # preset: its task and modality
    "xray-28-classification": ("classification", "xray"),
    "xray-classification": ("classification", "xray"),
    "mri-crop-segmentation": ("segmentation", "mri"),
    "mri-segmentation": ("segmentation", "mri"),
}
LEAST = 0.3  # seconds that torch is timed for at once
OWN, EXACT = "own norms.onnx", "exact norms.onnx"


def main() -> None:
    """Measure every network, print the ratios, write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("onnx_runtime.json"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=2, metavar=("FOLDER", "RUNTIME"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(Path(arguments.memory[0]), arguments.memory[1])))
        return
    from medim.files import write_json

    rows = {preset: measured(preset, *case, rounds=arguments.rounds) for preset, case in CASES.items()}
    write_json(arguments.out, {"schema_version": 1, "threads": 1, "networks": rows})


def measured(preset: str, task: str, modality: Any, *, rounds: int) -> dict[str, Any]:
    """Ratios of a network, all in one folder: weights and both graphs."""
    import torch
    from timing import ratios, seconds, shown

    from medim.export.onnx import signature_of, sizes_of, to_onnx
    from medim.models.model import as_run, build_model
    from medim.models.ood_features import Watched
    from medim.models.serialization import save
    from medim.package.onnx_session import session
    from medim.training.finetune.run import resolve_config

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = resolve_config(task, modality, None, preset)
    sides = tuple(config.views.shape)
    spec: dict[str, Any] = {"kind": task, "encoder": config.encoder, "decoder": config.decoder, "head": config.head}
    spec |= {"in_channels": 1, "out_channels": 3, "spatial_dims": len(sides), "input_shape": list(sides)}
    model: Any = build_model(spec).eval()
    made = Watched(model).eval()
    sizes = sizes_of(made, sides, tuple(model.encoder.strides), 1)
    signature = signature_of(made, sizes, 1, tuple(model.encoder.strides))
    image = np.random.default_rng(0).standard_normal((1, 1, *sides)).astype(np.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, "model", model, spec)
        np.save(folder / "image.npy", image)
        (folder / "signature.json").write_text(signature.model_dump_json())
        for file in (OWN, EXACT):
            (folder / file).write_bytes(to_onnx(made, sizes, signature, exact_norms=file == EXACT))
        own, exact = (session((folder / file).read_bytes(), signature, threads=1) for file in (OWN, EXACT))
        run = as_run(model)
        calls: dict[str, Callable[[], object]] = {
            "torch": lambda: run(image),
            "exact norms": lambda: exact(image),
            "own norms": lambda: own(image),
            "exact norms and guard": lambda: exact.both(image),
        }
        calls["torch"]()
        times = max(1, round(LEAST / seconds(calls["torch"])))
        time = ratios({name: _repeated(call, times) for name, call in calls.items()}, rounds)
        taken = {runtime: _process(folder, runtime) for runtime in ("torch", OWN, EXACT)}
    over = {
        runtime.removesuffix(".onnx"): {key: taken[runtime][key] / taken["torch"][key] for key in ("peak", "added")}
        for runtime in (OWN, EXACT)
    }
    print(f"{preset} {list(sides)}", {name: shown(ratio) for name, ratio in time.items()}, over, flush=True)
    return {"image": list(sides), "time_over_torch": time, "memory_over_torch": over, "bytes": taken}


def _repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


def memory(folder: Path, runtime: str) -> dict[str, int]:
    """Bytes: the peak of this process, and what one call added to what was held before."""
    image = np.load(folder / "image.npy")
    run: Any
    if runtime == "torch":
        import torch

        from medim.models.model import as_run
        from medim.models.serialization import load_model

        torch.set_num_threads(1)
        run = as_run(load_model(folder)[0])
    else:
        from medim.package.contract import Signature
        from medim.package.onnx_session import session

        signature = Signature.model_validate_json((folder / "signature.json").read_bytes())
        run = session((folder / runtime).read_bytes(), signature, threads=1)
    before = _held("VmRSS")
    run(image)
    return {"peak": _held("VmHWM"), "added": _held("VmHWM") - before}


def _process(folder: Path, runtime: str) -> dict[str, int]:
    ran = subprocess.run(
        [sys.executable, __file__, "--memory", str(folder), runtime], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(ran.stdout)
    return found


def _held(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


if __name__ == "__main__":
    main()
