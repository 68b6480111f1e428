"""What of a package MONAI has classes for: its own transforms for our steps, its DynUNet for our U-Net segmenter."""

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
from medim.package.gate import Gate, gate, not_run
from medim.types import Step, Volume

Section = dict[str, Any]
UNET = ("encoder", "decoder")
PREPROCESSING = 1e-6  # largest difference, over the range of the image
GRID = 1e-6  # mm: largest difference of places


def is_native(contract: Contract) -> bool:
    """Whether MONAI alone can run the bundle."""
    spec = contract.architecture
    if contract.kind != "segmenter" or contract.spatial_dims != 3 or spec["encoder"]["name"] != "unet":
        return False
    levels, norms = len(spec["encoder"].get("channels", range(4))), {spec[part].get("norm", "in") for part in UNET}
    whole = contract.inference["mode"] == "sliding" or contract.inference.get("multiple_of", 1) == 1
    return levels >= 3 and len(norms) == 1 and whole and native_steps(contract.preprocess) is not None


def native_steps(steps: Sequence[Step]) -> list[Section] | None:
    """3D preprocessing in transforms of MONAI's for the key "image"; None where it has no counterpart of a step."""
    found: list[Section] = []
    for step in steps:
        name, options = step["op"], {key: value for key, value in step.items() if key != "op"}
        native = _NATIVE[name](**options) if name in _NATIVE else None
        if native is None:
            return None
        found += native
    return found


def _resample(*, spacing: list[float], order: int = 1, antialias: bool = False) -> list[Section] | None:
    modes = {0: "nearest", 1: "bilinear"}
    if antialias or order not in modes:
        return None
    return [_on_image("Spacingd", pixdim=list(spacing), mode=modes[order], padding_mode="border")]


def _normalise(*, method: str = "zscore") -> list[Section]:
    if method == "zscore":
        return [_on_image("NormalizeIntensityd", channel_wise=True)]
    least = {"range": 0.0, "symmetric": -1.0}[method]
    return [_on_image("ScaleIntensityd", minv=least, maxv=1.0, channel_wise=True)]


def _clip(*, lower: float = 0.5, upper: float = 99.5) -> list[Section]:
    return [_on_image("ClipIntensityPercentilesd", lower=lower, upper=upper, channel_wise=True)]


def _on_image(transform: str, **options: Any) -> Section:
    return {"_target_": transform, "keys": "image", **options}


_NATIVE: dict[str, Callable[..., list[Section] | None]] = {
    "orthogonalise_affine": list,  # it has no counterpart, and acts only where a header's rounding bent the axes
    "ras": lambda: [_on_image("Orientationd", axcodes="RAS", labels=None)],
    "resample": _resample,
    "clip_percentiles": _clip,
    "normalise": _normalise,
}


def dynunet(contract: Contract, channels: Sequence[int]) -> Section:
    """DynUNet's options for a segmenter of medim's, whose maps have some channels."""
    strides = [1, *[2] * (len(channels) - 1)]
    return {
        "spatial_dims": contract.spatial_dims,
        "in_channels": contract.in_channels,
        "out_channels": len(contract.classes) + 1,
        "kernel_size": [3] * len(strides),
        "strides": strides,
        "upsample_kernel_size": strides[1:],
        "filters": list(channels),
        "norm_name": norm_spec(contract.architecture["encoder"].get("norm", "in")),
    }


def as_dynunet(source: Any, contract: Contract) -> DynUNet:
    """A segmenter of medim's as a DynUNet with the same weights: the blocks are MONAI's own, under other names."""
    made = DynUNet(**dynunet(contract, source.encoder.channels))
    down: list[Any] = [made.input_block, *made.downsamples, made.bottleneck]
    pairs = [*zip(source.encoder.levels, down, strict=True)]
    pairs += [*zip(source.decoder.levels, made.upsamples, strict=True), (source.head.conv, made.output_block.conv.conv)]
    for ours, theirs in pairs:
        theirs.load_state_dict(ours.state_dict())
    return made


def preprocessing(volume: Volume, contract: Contract) -> Gate:
    """Preprocessing in the hospital against MONAI's transforms: largest difference over the range of the image."""
    native = native_steps(contract.preprocess) if volume.spatial_dims == 3 else None
    if native is None:
        return not_run("MONAI has no counterpart of a step")
    parser = ConfigParser({"steps": {"_target_": "Compose", "transforms": native}})
    image = MetaTensor(torch.from_numpy(volume.array.copy()), affine=torch.from_numpy(volume.affine))
    theirs = parser.get_parsed_content("steps")({"image": image})["image"]
    ours = preprocess(volume, contract.preprocess)
    moved = float("inf")
    if ours.array.shape == theirs.shape:
        moved = float(np.abs(np.asarray(theirs.affine) - ours.affine).max())
    if moved > GRID:
        return gate(1e30, PREPROCESSING, shapes=[list(ours.array.shape), list(theirs.shape)])
    gap = np.abs(theirs.numpy() - ours.array).max() / max(float(np.ptp(ours.array)), 1e-9)
    return gate(float(f"{gap:.2e}"), PREPROCESSING)
