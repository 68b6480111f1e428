"""Claim: the `affine` augmentation needs a fraction of the time of MONAI's `RandAffine` for the same images.

Median ratio of the time per view: alternating calls in one process with one thread.

    python benchmarks/affine.py --out affine.json
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from monai.data.meta_obj import set_track_meta
from monai.transforms.spatial.array import RandAffine
from timing import Ratio, format_ratio, measure_ratios

from medim.data.loading.augmentations import AUGMENTATIONS
from medim.files import write_json

SHAPES = ((28, 28), (128, 128), (40, 56, 40))


def main() -> None:
    """Measure all shapes; print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("affine.json"))
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    set_track_meta(False)
    rows = {"x".join(map(str, shape)): measure_affine(shape, arguments.rounds) for shape in SHAPES}
    for shape, ratio in rows.items():
        print(f"{shape:10} medim / MONAI {format_ratio(ratio)}")
    write_json(arguments.out, {"schema_version": 2, "ours_over_monai": rows})


def measure_affine(shape: tuple[int, ...], rounds: int) -> Ratio:
    """Measure the ratio of a call of medim to a call of MONAI."""
    dims, image = len(shape), torch.rand(1, *shape)
    ours = AUGMENTATIONS["affine"](spatial_dims=dims, rotate=10.0, scale=0.1, translate=3.0, probability=1.0)
    angles, sizes, shifts = [math.radians(10.0)] * (1 if dims == 2 else 3), [0.1] * dims, [3.0] * dims
    monai = RandAffine(prob=1.0, rotate_range=angles, scale_range=sizes, translate_range=shifts, padding_mode="border")
    return measure_ratios({"MONAI": lambda: monai(image), "ours": lambda: ours(image)}, rounds)["ours"]


if __name__ == "__main__":
    main()
