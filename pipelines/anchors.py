"""Pretrain one network with each objective for the same number of steps: baselines for `medim study --frozen`.

Encoder, preprocessing, views, schedule and batch are those of a preset; only the objectives differ. Finished runs are
kept. Labels are not used for checkpoint selection. At the end, the options to add the encoders to a study are printed.

    python pipelines/anchors.py --preset mri-crop --data mri-hippocampus --steps 700 --out studies/anchors-mri
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from evidence import run_once

from medim.config import PretrainConfig, Section, load_config
from medim.data.index.index import build_index
from medim.training.pretrain.run import pretrain

GLOBAL_DIM: Section = {"name": "global_dim", "estimator": "infonce", "batch_norm_summary": True, "score_penalty": 0.04}
TWO_VIEWS = ("AMDIM", "SimCLR")


def build_arms(base: PretrainConfig) -> dict[str, list[Section]]:
    """Build the objectives of each arm from those of a preset; reconstruction only if the preset has a decoder."""
    by_name = {section["name"]: section for section in base.objectives}
    local = {key: value for key, value in by_name["local_dim"].items() if key != "weight"}
    coordinates, level = by_name["coordinates"], local["feature_level"]
    occlusion_section = {**local, "occlusion": "receptive_field"}
    arms: dict[str, list[Section]] = {
        "DIM(L), InfoNCE": [local],
        "DIM(L), JSD": [{**local, "estimator": "jsd"}],
        "DIM(L), DV": [{**local, "estimator": "dv"}],
        "DIM(G)": [GLOBAL_DIM],
        "DIM(L+G)": [{**local, "weight": 0.5}, {**GLOBAL_DIM, "weight": 0.5}],
        "DIM(L), occlusion": [occlusion_section],
        "DIM(L), coordinates": [local, coordinates],
        "DIM(L), both": [occlusion_section, coordinates],
        "AMDIM": [{"name": "amdim", "width": 128}],
        "CPC": [{"name": "cpc", "feature_level": level, "steps": 3, "negatives": 16, "scale_scores": True}],
        "VAE": [{"name": "vae", "decoder_channels": [128, 64, 32]}],
        "SimCLR": [{"name": "simclr"}],
    }
    return arms | ({"reconstruction": [by_name["reconstruction"]]} if base.decoder else {})


def get_run_folder(out: Path, arm: str, seed: int) -> Path:
    """Return the folder of the run of an arm."""
    return out / f"{''.join(c if c.isalnum() else '-' for c in arm)}-{seed}"


def main() -> None:
    """Run all missing runs, and print the options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True, help="pretraining preset with local_dim and coordinates")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms to run, such as 'DIM(G)' VAE")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    base = load_config("pretrain", arguments.preset, [f"max_steps={arguments.steps}", "checkpoint_selection=loss"])
    index, out = build_index(arguments.data, base.modality, keep_names=True), arguments.out
    for arm, sections in build_arms(base).items():
        if arm in (arguments.only or build_arms(base)):
            views = base.views.model_copy(update={"count": 2} if arm in TWO_VIEWS else {})
            decoder = base.decoder if arm == "reconstruction" else None
            settings = base.model_copy(update={"objectives": sections, "views": views, "decoder": decoder})
            run_once(get_run_folder(out, arm, 0), partial(pretrain, settings, index, seed=0, store=out / "store"))
            print(f"--frozen {arm.replace(', ', '-').replace('(', '-').replace(')', '')}={get_run_folder(out, arm, 0)}")


if __name__ == "__main__":
    main()
