"""Check the environment of medim: packages, devices, codecs, tracking and disk, with a remedy per failed check."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from medim.version import DISTRIBUTION, __version__, install_command


@dataclass(frozen=True)
class EnvironmentCheck:
    """Result of one check: its name, whether it passed, the observed status, and the remedy if it failed."""

    name: str
    ok: bool
    status: str
    remedy: str = ""


def run_checks() -> Iterator[EnvironmentCheck]:
    """Check the Python packages, devices, DICOM codecs, MLflow target, site key and free disk space."""
    yield _check_distribution()
    yield from _check_packages()
    if importlib.util.find_spec("torch"):
        yield from _check_devices()
    yield from _check_codecs()
    yield from _check_disk()
    yield EnvironmentCheck("MLflow target", True, _describe_tracking())
    key = os.environ.get("MEDIM_SITE_KEY")
    yield EnvironmentCheck(
        "site key", True, "MEDIM_SITE_KEY is set" if key else "a file in the user's config folder, created at first use"
    )


def _describe_tracking() -> str:
    if os.environ.get("MEDIM_TRACKING", "").strip().lower() == "off":
        return "none, because MEDIM_TRACKING is off"
    return "MLFLOW_TRACKING_URI is set" if os.environ.get("MLFLOW_TRACKING_URI") else "mlflow.db in the working folder"


def _check_distribution() -> EnvironmentCheck:
    """Check that the unrelated distribution `medim` of the package index is not installed beside this one."""
    name = "distribution"
    try:
        foreign_version = metadata.version("medim")
    except metadata.PackageNotFoundError:
        return EnvironmentCheck(name, True, f"{DISTRIBUTION} {__version__}")
    return EnvironmentCheck(
        name,
        False,
        f"{DISTRIBUTION} {__version__} and the unrelated package medim {foreign_version}, with the same import name",
        "pip uninstall medim, then install this one again",
    )


def _check_packages() -> Iterator[EnvironmentCheck]:
    light, train = (
        ("numpy", "pydicom", "nibabel", "onnxruntime"),
        ("torch", "monai", "lightning", "mlflow", "blosc2", "pyarrow"),
    )
    for group, remedy in (
        (light, install_command()),
        (train, f"{install_command('train')} for pretrain, finetune and export"),
    ):
        for name in group:
            is_installed = importlib.util.find_spec(name) is not None
            yield EnvironmentCheck(
                name,
                is_installed,
                metadata.version(name) if is_installed else "not installed",
                "" if is_installed else remedy,
            )


def _check_devices() -> Iterator[EnvironmentCheck]:
    import torch

    yield EnvironmentCheck("CPU threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield EnvironmentCheck(
        "GPU",
        bool(gpus),
        ", ".join(gpus) or "none",
        "" if gpus else "CPU works for small presets; for more, a CUDA build of torch",
    )
    bf16 = torch.cuda.is_bf16_supported() if gpus else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    yield EnvironmentCheck(
        "precision", True, "32-true, bf16-mixed" if bf16 else "32-true (no bf16 arithmetic: bf16-mixed runs as 32-true)"
    )


def _check_codecs() -> Iterator[EnvironmentCheck]:
    from pydicom.uid import (
        JPEG2000Lossless,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLosslessSV1,
        JPEGLSLossless,
        RLELossless,
    )

    from medim.data.readers import ReadError
    from medim.data.readers.dicom.codestreams import CODEC_REMEDY, check_codec, check_extended_jpeg

    for syntax in (
        JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1, JPEG2000Lossless, JPEGLSLossless, RLELossless
    ):  # fmt: skip
        try:
            check_codec(syntax)
            if syntax == JPEGExtended12Bit:
                check_extended_jpeg()
        except ReadError:
            yield EnvironmentCheck(f"DICOM {syntax.name}", False, "no decoder", CODEC_REMEDY)
        else:
            yield EnvironmentCheck(f"DICOM {syntax.name}", True, "decodes")


def _check_disk() -> Iterator[EnvironmentCheck]:
    for name, folder in (
        ("disk here", Path.cwd()),
        ("disk of the cache", Path(os.environ.get("MEDIM_CACHE", Path.home()))),
    ):
        nearest_folder = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(nearest_folder).free / 2**30
        yield EnvironmentCheck(
            name,
            free > 5,
            f"{free:.0f} GiB free",
            "" if free > 5 else "free some space, or set MEDIM_CACHE to a larger disk",
        )
