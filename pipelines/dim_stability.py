"""Stability of DIM(L) in different settings: two tables and two figures of docs/results.md.

In 3D, DIM(L) does not learn if a coordinate loss has a large weight and uses the summary. In 2D, scores without
stabilisation diverge. Each setting is run with three seeds. Finished runs are kept, so the study can be interrupted and
restarted.

    python pipelines/dim_stability.py --mri mri-hippocampus --xray pneumoniamnist.npz --out studies/stability
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

import numpy as np
from evidence import RunSeries, draw_curves, format_markdown_table, read_series, run_once, write_section

from medim.config import load_config
from medim.data.index.index import build_index
from medim.training.pretrain.run import pretrain
from medim.types import Modality

SEEDS = (0, 1, 2)
DIM = (
    "{name: local_dim, estimator: infonce, feature_level: 2, batch_norm_summary: %s, score_penalty: 0.04, "
    "critic: {name: encode_and_dot, width: 64, local_norm: none, summary_norm: none, scale_scores: true, clip: 20.0}}"
)
LIGHT = "{name: coordinates, weight: 0.1, feature_level: 2, hidden: 64, points: 64, use_summary: false}"
HEAVY = "{name: coordinates, weight: 2.0, feature_level: 2, hidden: 64, points: 0, use_summary: true}"
SMALL = ["encoder.channels=[4, 12, 24, 48]", "decoder=null", "max_steps=1000", "warmup_steps=20"]
SETTINGS: dict[str, dict[str, list[str]]] = {
    "mri-crop": {
        "heavy": [*SMALL, f"objectives=[{DIM % 'false'}, {HEAVY}]"],
        "heavy, standardised": [*SMALL, f"objectives=[{DIM % 'true'}, {HEAVY}]"],
        "light, standardised": [*SMALL, f"objectives=[{DIM % 'true'}, {LIGHT}]"],
    },
    "xray-28": {
        "plain": [
            *("objectives.0.batch_norm_summary=false", "objectives.0.score_penalty=0.0"),
            *("objectives.0.critic.clip=0.0", "gradient_clip=0.0"),
        ],
        "stabilised": [],
    },
}
PANELS = {"loss": "local_dim", "retrieval": "local_dim/retrieval", "z": "local_dim/spread"}


def main() -> None:
    """Run all missing runs, and write tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mri", type=Path, required=True)
    parser.add_argument("--xray", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sources: dict[str, tuple[Path, Modality]] = {
        "mri-crop": (arguments.mri, "mri"),
        "xray-28": (arguments.xray, "xray"),
    }
    for preset, settings in SETTINGS.items():
        index, rows, chance = build_index(*sources[preset], keep_names=True), [], 0.0
        curves: dict[str, dict[str, RunSeries]] = {title: {} for title in PANELS}
        for name, changes in settings.items():
            config = load_config("pretrain", preset, changes)
            start = partial(pretrain, config, index, stop_on_collapse=True, store=arguments.out / "store")
            runs = {seed: arguments.out / f"{preset}-{name.replace(', ', '-')}-{seed}" for seed in SEEDS}
            summaries = [run_once(run, partial(start, seed=seed)) for seed, run in runs.items()]
            histories, chance = [read_series(run) for run in runs.values()], summaries[0]["chance"]["local_dim"]
            for title, key in PANELS.items():
                curves[title] |= {f"{name}, {seed}": series[key] for seed, series in zip(SEEDS, histories, strict=True)}
            rows.append(
                [name, *_format_setting(histories, chance), ", ".join(summary["verdict"] for summary in summaries)]
            )
        head = ["setting", "leaves chance at step", "held out: chance - loss", "retrieval", "z", "steps", "verdicts"]
        draw_curves(arguments.page.parent / "figures" / f"dim-{preset}.svg", curves, {"loss": chance})
        write_section(arguments.page, f"{preset} stability", format_markdown_table(head, rows))


def _format_setting(histories: list[dict[str, RunSeries]], chance: float) -> list[str]:
    """Format the table cells of one setting, with one value per seed."""
    first_steps = [
        _find_first_step_below([value for _, value in series["local_dim"]], chance - 0.1) for series in histories
    ]
    val_gaps = [f"{chance - series['held out local_dim'][-1][1]:.2f}" for series in histories]
    ends = [
        [f"{np.mean([v for _, v in series[key][-20:]]):.2f}" for series in histories]
        for key in list(PANELS.values())[1:]
    ]
    steps = [str(series["local_dim"][-1][0]) for series in histories]
    return [" / ".join(values) for values in (first_steps, val_gaps, *ends, steps)]


def _find_first_step_below(losses: list[float], level: float) -> str:
    """Find the first step with a running mean over ten steps below a level."""
    means = np.convolve(losses, np.ones(10) / 10, "valid")
    below = np.flatnonzero(means < level)
    return str(int(below[0]) + 10) if len(below) else "never"


if __name__ == "__main__":
    main()
