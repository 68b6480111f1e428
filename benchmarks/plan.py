"""Claim: `medim plan` predicts run time within 25 % and peak memory within 20 % of the actual run.

Three short runs are planned and executed in separate processes with one store: X-rays in 2D with a loading process, MRI
crops in 3D with gradient caching, and a small preset on the built-in cohort. Both wall time (from the summary of the
run) and CPU time are compared; CPU time depends less on other processes of the machine.

    python benchmarks/plan.py --xray pneumoniamnist.npz --mri mri-hippocampus --out plan.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import call_in_process

from medim.data.source import open_source
from medim.files import write_json
from medim.training.plan.estimate import PlanEstimate
from medim.training.plan.plan import plan_pretraining
from medim.training.pretrain.config import resolve_pretrain_config
from medim.training.pretrain.run import pretrain
from medim.types import Modality


def main() -> None:
    """Plan and execute each run; print and write the ratios of predicted to actual values."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--xray", type=Path, required=True)
    parser.add_argument("--mri", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs=3, default=[100, 200, 20], metavar="N", help="steps of each run")
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    arguments = parser.parse_args()
    small, xray, mri = (f"max_steps={steps}" for steps in arguments.steps)
    runs: dict[str, tuple[Path | None, Modality, str, list[str]]] = {
        "test-3d-local-dim": (None, "mri", "test-3d-local-dim", [small]),
        "xray-28": (arguments.xray, "xray", "xray-28", [xray]),
        "mri-crop": (arguments.mri, "mri", "mri-crop", [mri, "gradient_cache_chunk=4", "checkpoint_every_steps=10"]),
    }
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (data, *run_options) in runs.items():
            work_folder, source = Path(folder) / name, data.absolute() if data and data.exists() else data
            prediction = call_in_process(plan_run, source, *run_options, work_folder)
            actual = call_in_process(execute_run, source, *run_options, work_folder)
            results[name] = {
                "planned": prediction,
                "real": actual,
                "planned_over_real": compute_plan_ratios(prediction, actual),
            }
            print(
                name,
                ", ".join(f"{key} {value:.2f}" for key, value in results[name]["planned_over_real"].items()),
                flush=True,
            )
            write_json(arguments.out, {"schema_version": 1, "cores": os.cpu_count(), "runs": results})


def plan_run(
    data: Path | None, modality: Modality, preset: str, assignments: list[str], work_folder: Path
) -> PlanEstimate:
    """Plan a run."""
    work_folder.mkdir(parents=True)
    os.chdir(work_folder)
    index, _ = open_source(data, modality)
    return plan_pretraining(
        resolve_pretrain_config(preset, assignments, index), index, work_folder / "run", store=work_folder / "store"
    )


def execute_run(
    data: Path | None, modality: Modality, preset: str, assignments: list[str], work_folder: Path
) -> dict[str, Any]:
    """Execute a run and measure its time, memory and disk space."""
    os.chdir(work_folder)
    index, _ = open_source(data, modality)
    config = resolve_pretrain_config(preset, assignments, index)
    start = time.process_time()
    summary = pretrain(config, index, work_folder / "run", store=work_folder / "store")
    cpu = time.process_time() - start
    run_bytes = sum(path.stat().st_size for path in (work_folder / "run").rglob("*") if path.is_file())
    keys = ("seconds", "seconds_per_step", "dataloader_wait_fraction", "peak_memory_bytes", "steps", "verdict")
    return {**{key: summary[key] for key in keys}, "cpu_seconds": cpu, "run_bytes": run_bytes}


def compute_plan_ratios(prediction: dict[str, Any], actual: dict[str, Any]) -> dict[str, float]:
    """Compute the ratios of predicted to actual values."""
    disk = prediction["disk_bytes"]
    return {
        "wall seconds": prediction["seconds"]["total"] / actual["seconds"],
        "processor seconds": prediction["cpu_seconds"]["total"] / actual["cpu_seconds"],
        "peak memory": prediction["peak_memory_bytes"] / actual["peak_memory_bytes"],
        "run folder": (disk["run"] + disk["checkpoints"]) / actual["run_bytes"],
    }


if __name__ == "__main__":
    main()
