"""What this machine has for medim, a line a check, a remedy where one fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, whether it is well, what was found, and what to do where it is not."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def checks() -> Iterator[Check]:
    """Look at Python packages, devices, DICOM codecs, the tracking target and the disk."""
    yield from _packages()
    if importlib.util.find_spec("torch"):
        yield from _devices()
    yield from _codecs()
    yield from _disk()
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    yield Check("MLflow target", True, "MLFLOW_TRACKING_URI is set" if uri else "mlflow.db in the working folder")
    key = os.environ.get("MEDIM_SITE_KEY")
    yield Check(
        "site key", True, "MEDIM_SITE_KEY is set" if key else "a file in the user's config folder, made at first use"
    )


def _packages() -> Iterator[Check]:
    light, train = (
        ("numpy", "pydicom", "nibabel", "onnxruntime"),
        ("torch", "monai", "lightning", "mlflow", "blosc2", "pyarrow"),
    )
    for group, remedy in (
        (light, "pip install medim"),
        (train, 'pip install "medim[train]" (for pretrain, finetune, export)'),
    ):
        for name in group:
            there = importlib.util.find_spec(name) is not None
            yield Check(name, there, metadata.version(name) if there else "not installed", "" if there else remedy)


def _devices() -> Iterator[Check]:
    import torch

    yield Check("CPU threads", True, f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check(
        "GPU",
        bool(gpus),
        ", ".join(gpus) or "none",
        "" if gpus else "CPU works for small presets; for more, a CUDA build of torch",
    )
    bf16 = torch.cuda.is_bf16_supported() if gpus else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    yield Check(
        "precision", True, "32-true, bf16-mixed" if bf16 else "32-true (no bf16 arithmetic: bf16-mixed runs as it)"
    )


def _codecs() -> Iterator[Check]:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, JPEGLosslessSV1, JPEGLSLossless, RLELossless

    for syntax in (JPEGBaseline8Bit, JPEGLosslessSV1, JPEG2000Lossless, JPEGLSLossless, RLELossless):
        there = get_decoder(syntax).is_available
        yield Check(
            f"DICOM {syntax.name}",
            there,
            "decodes" if there else "no decoder",
            "" if there else "pip install python-gdcm pylibjpeg-openjpeg",
        )


def _disk() -> Iterator[Check]:
    for name, folder in (
        ("disk here", Path.cwd()),
        ("disk of the cache", Path(os.environ.get("MEDIM_CACHE", Path.home()))),
    ):
        place = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(place).free / 2**30
        yield Check(
            name,
            free > 5,
            f"{free:.0f} GiB free",
            "" if free > 5 else "free some space, or set MEDIM_CACHE to a larger disk",
        )
