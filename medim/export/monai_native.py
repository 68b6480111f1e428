"""Conversion to classes of MONAI: transforms for preprocessing steps, and DynUNet for a U-Net segmenter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai.bundle.config_parser import ConfigParser
from monai.data.meta_tensor import MetaTensor
from monai.networks.nets.dynunet import DynUNet

from medim.data.preprocessing.steps import preprocess
from medim.models.layers import norm_spec
from medim.package.contract import Contract
from medim.package.gate import GateResult, gate_result, skip_gate
from medim.tasks import is_dense
from medim.types import Step, Volume

BundleSection = dict[str, Any]
PREPROCESSING_TOLERANCE = 1e-6  # largest difference, relative to the range of the image
GRID_TOLERANCE = 1e-6  # largest difference of the affine entries, mm


def is_monai_native(contract: Contract) -> bool:
    """Whether MONAI can run the bundle without medim."""
    spec = contract.spec
    if not is_dense(contract.kind) or contract.spatial_dims != 3 or spec.encoder["name"] != "unet":
        return False
    levels, norms = (
        len(spec.encoder.get("channels", range(4))),
        {(part or {}).get("norm", "in") for part in (spec.encoder, spec.decoder)},
    )
    whole = contract.inference["mode"] == "sliding" or contract.inference.get("multiple_of", 1) == 1
    return levels >= 3 and len(norms) == 1 and whole and to_monai_transforms(contract.preprocess) is not None


def to_monai_transforms(steps: Sequence[Step]) -> list[BundleSection] | None:
    """Convert 3D preprocessing steps to MONAI transforms for the key "image"; None if a step has no counterpart."""
    transforms: list[BundleSection] = []
    for step in steps:
        name, options = step["op"], {key: value for key, value in step.items() if key != "op"}
        converted_step = _CONVERTERS[name](**options) if name in _CONVERTERS else None
        if converted_step is None:
            return None
        transforms += converted_step
    return transforms


def _convert_resample(*, spacing: list[float], order: int = 1, antialias: bool = False) -> list[BundleSection] | None:
    modes = {0: "nearest", 1: "bilinear"}
    if antialias or order not in modes:
        return None
    return [_make_transform("Spacingd", pixdim=list(spacing), mode=modes[order], padding_mode="border")]


def _convert_normalise(*, method: str = "zscore") -> list[BundleSection]:
    if method == "zscore":
        return [_make_transform("NormalizeIntensityd", channel_wise=True)]
    minimum = {"range": 0.0, "symmetric": -1.0}[method]
    return [_make_transform("ScaleIntensityd", minv=minimum, maxv=1.0, channel_wise=True)]


def _convert_clip(*, lower: float = 0.5, upper: float = 99.5) -> list[BundleSection]:
    return [_make_transform("ClipIntensityPercentilesd", lower=lower, upper=upper, channel_wise=True)]


def _make_transform(transform: str, **options: Any) -> BundleSection:
    return {"_target_": transform, "keys": "image", **options}


_CONVERTERS: dict[str, Callable[..., list[BundleSection] | None]] = {
    "orthogonalise_affine": list,  # no counterpart; it only corrects axes that rounding in the header made oblique
    "ras": lambda: [_make_transform("Orientationd", axcodes="RAS", labels=None)],
    "resample": _convert_resample,
    "clip_percentiles": _convert_clip,
    "normalise": _convert_normalise,
}


def dynunet_options(contract: Contract, channels: Sequence[int]) -> BundleSection:
    """Build the options of DynUNet for a medim segmenter.

    Args:
        contract: contract of the segmenter.
        channels: number of channels of each level.
    """
    strides = [1, *[2] * (len(channels) - 1)]
    return {
        "spatial_dims": contract.spatial_dims,
        "in_channels": contract.in_channels,
        "out_channels": len(contract.classes) + 1,
        "kernel_size": [3] * len(strides),
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": list(channels),
        "norm_name": norm_spec(contract.spec.encoder.get("norm", "in")),
    }


def to_dynunet(source: Any, contract: Contract) -> DynUNet:
    """Convert a medim segmenter to a DynUNet with the same weights; both consist of the same MONAI blocks."""
    target = DynUNet(**dynunet_options(contract, source.encoder.channels))
    down: list[Any] = [target.input_block, *target.downsamples, target.bottleneck]
    pairs = [*zip(source.encoder.levels, down, strict=True)]
    pairs += [
        *zip(source.decoder.levels, target.upsamples, strict=True),
        (source.head.conv, target.output_block.conv.conv),
    ]
    for source_block, target_block in pairs:
        target_block.load_state_dict(source_block.state_dict())
    return target


def check_monai_preprocessing(volume: Volume, contract: Contract) -> GateResult:
    """Compare the preprocessing of medim with MONAI's transforms: largest difference relative to the image range."""
    transforms = to_monai_transforms(contract.preprocess) if volume.spatial_dims == 3 else None
    if transforms is None:
        return skip_gate("MONAI has no transform for a preprocessing step")
    parser = ConfigParser({"steps": {"_target_": "Compose", "transforms": transforms}})
    image = MetaTensor(torch.from_numpy(volume.array.copy()), affine=torch.from_numpy(volume.affine))
    monai_image = parser.get_parsed_content("steps")({"image": image})["image"]
    medim_volume = preprocess(volume, contract.preprocess)
    grid_shift = float("inf")
    if medim_volume.array.shape == monai_image.shape:
        grid_shift = float(np.abs(np.asarray(monai_image.affine) - medim_volume.affine).max())
    if grid_shift > GRID_TOLERANCE:
        return gate_result(
            1e30, PREPROCESSING_TOLERANCE, shapes=[list(medim_volume.array.shape), list(monai_image.shape)]
        )
    gap = np.abs(monai_image.numpy() - medim_volume.array).max() / max(float(np.ptp(medim_volume.array)), 1e-9)
    return gate_result(float(f"{gap:.2e}"), PREPROCESSING_TOLERANCE)
