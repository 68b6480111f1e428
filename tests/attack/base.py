"""Small runs of each command, on which the attacks work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from medim.export.builder import ExportOptions
from medim.export.export import export
from tests.attack.case import run_command
from tests.data.synthetic import noise, save, write_nifti, xray
from tests.export.packages import make_run
from tests.study.conftest import make_pictures
from tests.test_signing import write_keys

EARLIER_STUDY = Path(__file__).resolve().parents[1] / "earlier_version" / "study"
N_PICTURES = 60
TRAIN = ("--device", "cpu")
PRETRAIN_CONFIG = """modality: xray
preprocessing: [{op: normalise, method: zscore}]
encoder: {name: unet, channels: [4, 8], summary_channels: 8}
decoder: {name: unet}
views: {shape: [8, 8], count: 2}
objectives: [{name: local_dim, estimator: infonce, critic: {name: encode_and_dot, width: 8}}]
max_steps: 6
batch_size: 4
lr: 0.01
checkpoint_every_steps: 2
checkpoint_selection: loss
"""
FINETUNE_CONFIG = """modality: xray
task: classification
head: {name: classification}
preprocessing: [{op: normalise, method: zscore}]
encoder: {name: unet, channels: [4, 8], summary_channels: 8}
views: {shape: [8, 8]}
max_steps: 6
batch_size: 4
lr: 0.01
checkpoint_every_steps: 2
"""


@contextmanager
def isolated_environment(folder: Path) -> Iterator[None]:
    """Set cache, site key and MLflow database to a folder, and restore the environment afterwards."""
    earlier = dict(os.environ)
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ.update(
        MEDIM_CACHE=str(folder / "cache"),
        XDG_CONFIG_HOME=str(folder / "config"),
        MEDIM_SITE_KEY="0123456789abcdef",
        MLFLOW_DISABLE_TELEMETRY="true",
        MPLBACKEND="Agg",
        TMPDIR=str(folder / "tmp"),
        OMP_NUM_THREADS="1",
        COLUMNS="200",
    )
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(earlier)


def build_base(folder: Path, *, full: bool) -> Path:
    """Run each command on 60 pictures; a folder that is complete already is used again.

    Contents: `png`, `index`, `store`, `pre`, `cls`, `eval`, `study`, `pkg` (a classifier), `scan.nii.gz`,
    `xray.dcm`, `xray.png`, `pre.yaml`, `fine.yaml`, `mlflow.db`, and the keys `trusted` and `other`.

    Args:
        folder: folder of the runs.
        full: whether the study is run (else that of the earlier version is copied), and `signed` (the classifier, with
            the key `trusted`), `pkgseg` (a segmenter) and `pkgenc` (an encoder) are exported.
    """
    complete = folder / "complete"
    if complete.is_file() and complete.read_text() == str(full):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    make_pictures(folder / "png", N_PICTURES)
    rows = [f"picture{number:02d}.png,{number // 2}" for number in range(N_PICTURES)]
    (folder / "png" / "subjects.csv").write_text("\n".join(["image,subject", *rows, ""]))
    (folder / "pre.yaml").write_text(PRETRAIN_CONFIG)
    (folder / "fine.yaml").write_text(FINETUNE_CONFIG)
    write_nifti(folder / "scan.nii.gz", noise(16, 24, 16))
    save(xray(noise(28, 28)), folder / "xray.dcm")
    Image.fromarray(noise(28, 28).astype("uint8")).save(folder / "xray.png")
    earlier = Path.cwd()
    os.chdir(folder)
    try:
        _run_commands(full=full)
    finally:
        os.chdir(earlier)
    complete.write_text(str(full))
    return folder


def _run_commands(*, full: bool) -> None:
    labels = ("--labels", "png/labels.csv")
    finetune = ("finetune", "--task", "classification", "--config", "fine.yaml", *TRAIN)
    commands: list[tuple[str, ...]] = [
        ("index", "png", "--modality", "xray", *labels, "--out", "index", "--jobs", "1"),
        ("preprocess", "index", "--modality", "xray", "--config", "pre.yaml", "--out", "store"),
        ("pretrain", "--modality", "xray", "--data", "store", "--config", "pre.yaml", "--out", "pre", *TRAIN),
        (*finetune, "--data", "index", "--encoder", "pre", "--out", "cls"),
        ("evaluate", "cls", "--data", "index", "--out", "eval", "--split", "all", "--include-training-subjects"),
    ]
    study = ("study", "--task", "classification", "--data", "index", "--encoder", "dim=pre", "--config", "fine.yaml")
    options = ("--labelled", "4", "--labelled", "12", "--seeds", "2", "--lr-multipliers", "fixed", "--out", "study")
    if full:
        commands.append((*study, *options, *TRAIN))
    else:
        shutil.copytree(EARLIER_STUDY, "study")
    for command in commands:
        if run_command(*command, "--quiet") != 0:
            raise RuntimeError(f"the base run failed: {' '.join(command)}")
    _export_packages(full=full)


def _export_packages(*, full: bool) -> None:
    trusted, _ = write_keys(Path(), "trusted")
    write_keys(Path(), "other")
    export(Path("cls"), Path("pkg"))
    if full:
        export(Path("cls"), Path("signed"), ExportOptions(private_key=trusted))
        make_run(Path("runs/segmenter"), "segmenter")
        export(Path("runs/segmenter"), Path("pkgseg"))
        export(Path("pre"), Path("pkgenc"))
