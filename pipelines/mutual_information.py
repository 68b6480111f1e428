"""How far DV, JSD and InfoNCE can be trusted: correlated Gaussians, whose mutual information is known.

Two critics: the log density ratio, to see what a bound can give, and a small network trained to raise that bound.
    OMP_NUM_THREADS=1 python pipelines/mutual_information.py
"""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence import format_markdown_table, open_figure, save_svg, write_section
from torch import nn

from medim.objectives.mutual_information import ESTIMATORS

DIMENSIONS, BATCHES, TRUTHS = {2: "-", 8: "--", 32: ":"}, (16, 64, 256), (0.5, 1, 2, 3, 4, 6, 8, 10)
STEPS, REPEATS = 300, 100  # training steps at each truth; batches, whose median is the estimate
TITLES = {"dv": "DV", "infonce": "InfoNCE", "nwj": "JSD, read by NWJ", "jsd": "JSD, its own value"}


def draw_pairs(
    dimension: int, truth: float, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw x and y (B, D), standard normal; each coordinate of y is correlated with that of x, `truth` nats in all."""
    x, noise = torch.randn(2, batch, dimension, generator=generator, dtype=torch.float64)
    residual = np.exp(-2 * truth / dimension)  # 1 - correlation^2, for -D/2 log(1 - correlation^2) is the information
    return x, (1 - residual) ** 0.5 * x + residual**0.5 * noise


def compute_log_ratio(x: torch.Tensor, y: torch.Tensor, truth: float) -> torch.Tensor:
    """The best critic there is: log p(y_j | x_i) / p(y_j), as scores (B, 1, B, 1)."""
    residual = np.exp(-2 * truth / x.shape[1])
    distance = torch.cdist((1 - residual) ** 0.5 * x, y).square()  # (B, B)
    return torch.as_tensor(truth + (y.square().sum(1) - distance / residual) / 2)[:, None, :, None]


def estimate_nwj(scores: torch.Tensor) -> torch.Tensor:
    """Read nats from JSD's scores, its value being in another unit: 1 + mean - mean exp (Nguyen et al. 2010)."""
    diagonal, scores = torch.eye(len(scores), dtype=torch.bool), scores[:, 0, :, 0]
    return 1 + scores[diagonal].mean() - scores[~diagonal].exp().mean()


def score_pairs(critic: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Scores (B, 1, B, 1) of a small critic: half of what it makes of x times the other half of what it makes of y."""
    return torch.einsum("iu,ju->ij", critic(x.float())[:, :64], critic(y.float())[:, 64:])[:, None, :, None]


def compute_estimates(dimension: int, batch: int, *, train: bool) -> dict[str, list[float]]:
    """Every reading at every truth; the networks, one a bound, go on training as the truth rises."""
    generator, results = torch.manual_seed(0), defaultdict[str, list[float]](list)
    readings: dict[Any, Any] = {**ESTIMATORS, "nwj": estimate_nwj}
    layers = {name: (nn.Linear(dimension, 128), nn.ReLU(), nn.Linear(128, 128)) for name in ESTIMATORS}
    critics = nn.ModuleDict({name: nn.Sequential(*modules) for name, modules in layers.items()})
    optimiser = torch.optim.Adam(critics.parameters(), 2e-3)
    for truth in TRUTHS:
        for _ in range(STEPS if train else 0):
            xy = draw_pairs(dimension, truth, batch, generator)
            optimiser.zero_grad()
            torch.autograd.backward(
                [-estimator(score_pairs(critics[name], *xy)) for name, estimator in ESTIMATORS.items()]
            )
            optimiser.step()
        with torch.no_grad():
            batches = [draw_pairs(dimension, truth, batch, generator) for _ in range(REPEATS)]
            for name, estimator in readings.items():
                critic = critics["jsd" if name == "nwj" else name]
                scores = (score_pairs(critic, *xy) if train else compute_log_ratio(*xy, truth) for xy in batches)
                results[name].append(float(np.median([estimator(s) for s in scores])))
    return results


def format_bound_cell(values: list[float]) -> str:
    """The last truth before the first estimate more than a tenth and 0.1 nat off; the estimates at 2, 6 and 10 nats."""
    misses = [abs(value - truth) > max(0.1, truth / 10) for value, truth in zip(values, TRUTHS, strict=True)]
    texts = (f"{v:.1f}" if v > 0 else "lost" for v in (values[TRUTHS.index(truth)] for truth in (2, 6, 10)))
    return f"**{(0, *TRUTHS)[[*misses, True].index(True)]:g}** ({' / '.join(texts)})"


def main() -> None:
    """Take every estimate, and write the table and the figure."""
    head, rows = ["critic", "dimension", "batch", *list(TITLES.values())[:3]], []
    with open_figure(2, len(TITLES)) as (figure, panels):
        for critic, dimension, batch in product(("best", "trained"), DIMENSIONS, BATCHES):
            results = compute_estimates(dimension, batch, train=critic == "trained")
            rows.append(
                [critic, f"{dimension}", f"{batch}", *(format_bound_cell(results[name]) for name in list(TITLES)[:3])]
            )
            for axes, (name, title) in zip(panels[int(critic == "trained")], TITLES.items(), strict=True):
                style = f"C{BATCHES.index(batch)}{DIMENSIONS[dimension]}"
                axes.plot(TRUTHS, results[name], style, linewidth=1, label=f"batch {batch}, {dimension}-D")
                axes.set(title=f"{title}, {critic} critic", ylim=(0, 1.5 if name == "jsd" else 12), xlabel="true, nats")
        for axes in panels[:, :3].flat:
            axes.plot(TRUTHS, TRUTHS, color="grey", linewidth=0.6)
        panels[0, 1].legend(frameon=False, fontsize=6)
        save_svg(figure, Path("docs/figures/calibration.svg"))
    write_section(Path("docs/concepts/bounds.md"), "calibration", format_markdown_table(head, rows))


if __name__ == "__main__":
    main()
