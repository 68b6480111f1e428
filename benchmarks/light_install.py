"""Claim: the light install, without PyTorch and network access, gives the same predictions as PyTorch in training.

A small hippocampus segmenter and a small X-ray classifier are trained and exported. The wheel is installed in a new
environment, and its `medim predict` is run on real DICOM files in a separate network namespace. Printed and written are
the voxels that differ from the torch pipeline and the Dice with it, the largest difference of a probability, time and
peak memory of the process, and the results for a wrong body part and a wrong modality.

    python benchmarks/light_install.py --data ../shared/data --work light-install --out light_install.json

Existing results in the folder `--work` are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom

REPOSITORY = Path(__file__).resolve().parents[1]
SERIES = {
    "HCropVolume, Study1": "mri-dicom/Study1/13_HCropVolume",
    "HCropVolume, Study2": "mri-dicom/Study2/14_HCropVolume",
    "T2": "mri-dicom/Study1/37916-T2reg-88910",
    "FLAIR": "mri-dicom/Study1/36459-FLAIRreg-76244",
}
XRAYS = ("xray-dicom/cr_jpeg_baseline.dcm", "xray-dicom/test1.dcm", "xray-dicom/test2.dcm", "xray-dicom/test3.dcm")
MONOCHROME1 = "dicom-formats/RG3_J2KI.dcm"
RIBS = "xray-dicom/test4.dcm"
MEASURE_SCRIPT = """
import json, os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
_, status, usage = os.wait4(child, 0)
seconds, peak = time.perf_counter() - start, usage.ru_maxrss / 1000
print(json.dumps({"exit": os.waitstatus_to_exitcode(status), "seconds": round(seconds, 2), "peak_mb": round(peak)}))
"""  # run in a small process, because a child that is forked from a large process inherits its peak memory
RULES = {"body_part": ["CHEST", "EXTREMITY"]}  # body part of RG3_J2KI: EXTREMITY, of test4: RIBCAGE


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("light-install"))
    parser.add_argument("--out", type=Path, default=Path("light_install.json"))
    parser.add_argument("--steps", type=int, default=250)
    arguments = parser.parse_args()
    data, work = arguments.data.resolve(), arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    binaries = install_wheel(work)
    runs = {name: train_model(work, data, name, steps=arguments.steps) for name in ("segmenter", "classifier")}
    packages = {name: export_package(work, name, run) for name, run in runs.items()}
    results = {
        "schema_version": 1,
        "torch_imports": (
            subprocess.run(
                [binaries / "python", "-c", "import torch"],
                env=build_clean_environment(),
                capture_output=True,
                check=False,
            ).returncode
            == 0
        ),
        "megabytes": measure_install_size(binaries.parent),
        "segmenter": {
            name: compare_segmentation(
                binaries, packages["segmenter"], runs["segmenter"], data / path, work / "masks" / str(n)
            )
            for n, (name, path) in enumerate(SERIES.items())
        },
        "classifier": compare_classification(
            binaries, packages["classifier"], runs["classifier"], data, work / "classes"
        ),
        "rejected": check_rejections(binaries, packages["classifier"], data, work / "refused"),
    }
    print(json.dumps(results, indent=1))
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


def install_wheel(work: Path) -> Path:
    """Install the wheel of this tree with its dependencies at the tested versions; return the folder bin/."""
    binaries = work / "venv" / "bin"
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", work / "dist", REPOSITORY]
    _run_command(build, work)
    (wheel,) = (work / "dist").glob("medim_infomax-*.whl")
    if not (binaries / "medim").is_file():
        venv.create(work / "venv", with_pip=True)
        pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--constraint"]
        _run_command([*pip, REPOSITORY / "constraints.txt", wheel], work)
    _run_command(
        [binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel], work
    )
    return binaries


def measure_install_size(folder: Path) -> dict[str, int]:
    """Measure the size of an environment in MB: total, and without pip and byte code."""
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    package_files = {path for path in files if not {"pip", "__pycache__"} & set(path.parts)}
    return {"all": sum(files.values()) // 10**6, "packages": sum(files[path] for path in package_files) // 10**6}


def train_model(work: Path, data: Path, name: str, *, steps: int) -> Path:
    """Train a small segmenter or classifier."""
    kinds = {
        "segmenter": ["segmentation", "mri", "mri-crop-segmentation", data / "mri-hippocampus"],
        "classifier": ["classification", "xray", "xray-28-classification", data / "xray-pneumonia/pneumoniamnist.npz"],
    }
    out = work / f"{name}-run"
    if not (out / "summary.json").is_file():
        task, modality, preset, source = kinds[name]
        command = ["finetune", "--task", task, "--modality", modality, "--config", preset, "--data", source]
        command += ["--label-fraction", "0.1"] if name == "classifier" else []
        command += ["--set", f"max_steps={steps}", "--set", "precision=32-true"]
        _run_command([sys.executable, "-m", "medim.cli", *command, "--overwrite", "--out", out], work)
    return out


def export_package(work: Path, name: str, run: Path) -> Path:
    """Export a run as a package."""
    out = work / f"{name}-package"
    if not out.is_dir():
        rules = work / "rules.json"
        rules.write_text(json.dumps(RULES))
        options = ["--label-codes", "hippocampus"] if name == "segmenter" else ["--dicom-rules", rules]
        _run_command([sys.executable, "-m", "medim.cli", "export", run, *options, "--out", out], work)
    return out


def compare_segmentation(binaries: Path, package: Path, run: Path, series: Path, out: Path) -> dict[str, Any]:
    """Compare the prediction of a series in the light install with that of the run in torch, on the native grid."""
    from medim.evaluation.evaluate import open_network
    from medim.predict.predict import predict

    cost = predict_offline(binaries, package, [series], out / "light", output_format="nifti")
    predict(open_network(run)[0], series, out / "torch", overwrite=True)
    (light,), (torch,) = (
        [np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj) for path in (out / name).glob("*.nii.gz")]
        for name in ("light", "torch")
    )
    result: dict[str, Any] = {"shape": list(light.shape), **cost, "voxels": light.size}
    result["differ"] = int((light != torch).sum())
    for label in (1, 2):
        ours, theirs = light == label, torch == label
        total = int(ours.sum() + theirs.sum())
        result[f"voxels_{label}"] = int(theirs.sum())
        result[f"dice_{label}"] = 2 * int((ours & theirs).sum()) / total if total else 1.0
    result["ood"] = _read_csv_rows(out / "light" / "predictions.csv")[0]["ood_score"]
    return result


def compare_classification(binaries: Path, package: Path, run: Path, data: Path, out: Path) -> dict[str, Any]:
    """Compare predictions for X-rays, one stored inverted, in the light install with torch; check DICOM reports."""
    from medim.evaluation.evaluate import open_network
    from medim.predict.predict import predict

    files = [data / name for name in (*XRAYS, MONOCHROME1)]
    cost = predict_offline(binaries, package, files, out / "light", output_format="nifti")
    reports = predict_offline(binaries, package, files, out / "dicom", output_format="dicom")
    predict(open_network(run)[0], files, out / "torch", overwrite=True)
    ours, theirs = (_read_csv_rows(out / name / "predictions.csv") for name in ("light", "torch"))
    names = [key for key in ours[0] if key.startswith("probability_")]
    gaps = [abs(float(a[key]) - float(b[key])) for a, b in zip(ours, theirs, strict=True) for key in names]
    report_classes = sorted(str(pydicom.dcmread(path).SOPClassUID.name) for path in (out / "dicom").glob("*.dcm"))
    return {
        **cost,
        "images": len(ours),
        "largest_difference": max(gaps),
        "reports": report_classes,
        "as_dicom": reports,
    }


def check_rejections(binaries: Path, package: Path, data: Path, out: Path) -> dict[str, Any]:
    """Predict images that the package must reject; return the exit code, and the reason of each file."""
    out.mkdir(parents=True, exist_ok=True)
    other = pydicom.dcmread(data / XRAYS[2])
    other.Modality, other.SOPInstanceUID = "CT", f"{other.SOPInstanceUID}.1"
    other.file_meta.MediaStorageSOPInstanceUID = other.SOPInstanceUID
    other.save_as(out / "ct.dcm")
    outcomes = {}
    for name, path in {"body part": data / RIBS, "modality": out / "ct.dcm"}.items():
        folder = out / name.replace(" ", "-")
        cost = predict_offline(binaries, package, [path], folder, output_format="nifti", code=4)
        outcomes[name] = {
            "exit": cost["exit"],
            "reasons": [row["reason"] for row in _read_csv_rows(folder / "rejected.csv")],
        }
    return outcomes


def predict_offline(
    binaries: Path, package: Path, inputs: Sequence[Path], out: Path, *, output_format: str, code: int = 0
) -> dict[str, Any]:
    """Run `medim predict` in a separate network namespace; return exit code, seconds and peak memory."""
    command = [
        *find_namespace_command(),
        binaries / "medim",
        "predict",
        package,
        *inputs,
        "--format",
        output_format,
        "--overwrite",
        "--out",
        out,
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    wrapper = [sys.executable, "-S", "-c", MEASURE_SCRIPT, *map(str, command)]
    process = subprocess.run(
        wrapper, cwd=out.parent, env=build_clean_environment(), capture_output=True, text=True, check=False
    )
    if not process.stdout:
        raise SystemExit(f"{command}: {process.stderr[-3000:]}")
    usage: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if usage["exit"] != code:
        raise SystemExit(f"{command}: expected exit {code}, got {usage['exit']}\n{process.stderr[-3000:]}")
    return usage


def find_namespace_command() -> list[str]:
    """Find the command prefix that disables network access."""
    for command in (["unshare", "--net"], ["unshare", "--net", "--map-root-user"]):
        if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
            return command
    raise SystemExit("unshare --net: root or unprivileged user namespaces are required to disable network access.")


def build_clean_environment() -> dict[str, str]:
    """Build the environment variables without those of Python."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def _read_csv_rows(path: Path) -> list[Mapping[str, str]]:
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _run_command(command: Sequence[object], cwd: Path) -> None:
    process = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{command}\n{process.stdout[-2000:]}\n{process.stderr[-3000:]}")


if __name__ == "__main__":
    main()
