"""Accuracy of DV, JSD and InfoNCE on correlated Gaussians with known mutual information.

Two critics are compared: the log density ratio, which is optimal, and a small network trained to maximise the bound.
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
STEPS, REPEATS = 300, 100  # training steps per true value; number of batches for the median estimate
TITLES = {"dv": "DV", "infonce": "InfoNCE", "nwj": "JSD, read by NWJ", "jsd": "JSD, its own value"}


def draw_pairs(
    dimension: int, truth: float, batch: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw standard normal x and y (B, D) with correlated coordinates and a mutual information of `truth` nats."""
    x, noise = torch.randn(2, batch, dimension, generator=generator, dtype=torch.float64)
    residual = np.exp(-2 * truth / dimension)  # 1 - correlation^2; the information is -D/2 log(1 - correlation^2)
    return x, (1 - residual) ** 0.5 * x + residual**0.5 * noise


def compute_log_ratio(x: torch.Tensor, y: torch.Tensor, truth: float) -> torch.Tensor:
    """Compute the scores (B, 1, B, 1) of the optimal critic, log p(y_j | x_i) / p(y_j)."""
    residual = np.exp(-2 * truth / x.shape[1])
    distance = torch.cdist((1 - residual) ** 0.5 * x, y).square()  # (B, B)
    return torch.as_tensor(truth + (y.square().sum(1) - distance / residual) / 2)[:, None, :, None]


def estimate_nwj(scores: torch.Tensor) -> torch.Tensor:
    """Estimate the information in nats from scores of JSD with the NWJ bound: 1 + mean - mean exp.

    The value of JSD itself is not in nats (Nguyen et al. 2010).
    """
    diagonal, scores = torch.eye(len(scores), dtype=torch.bool), scores[:, 0, :, 0]
    return 1 + scores[diagonal].mean() - scores[~diagonal].exp().mean()


def score_pairs(critic: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute the scores (B, 1, B, 1) of a small critic: products of one half of its outputs for x and y each."""
    return torch.einsum("iu,ju->ij", critic(x.float())[:, :64], critic(y.float())[:, 64:])[:, None, :, None]


def compute_estimates(dimension: int, batch: int, *, train: bool) -> dict[str, list[float]]:
    """Compute all estimates for all true values; one network per bound is trained further as the true value rises."""
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
    """Format the largest accurately estimated value, and the estimates at 2, 6 and 10 nats.

    Estimates are accurate up to the first true value with an error of more than 10 % and 0.1 nat.
    """
    misses = [abs(value - truth) > max(0.1, truth / 10) for value, truth in zip(values, TRUTHS, strict=True)]
    texts = (f"{v:.1f}" if v > 0 else "lost" for v in (values[TRUTHS.index(truth)] for truth in (2, 6, 10)))
    return f"**{(0, *TRUTHS)[[*misses, True].index(True)]:g}** ({' / '.join(texts)})"


def main() -> None:
    """Compute all estimates, and write the table and the figure."""
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
