"""Claim: the coverage of the 95 % intervals of `medim study` is at least 90 % and rarely above 98 %.

Synthetic studies have a known effect, with runs of S pretraining seeds and T label subsets on N subjects. `MIXES`
defines the fractions of the variance of the mean difference due to seeds, subsets, their interaction, subjects, seeds x
subjects, subsets x subjects, and the rest. With one seed or subset, the true value is that of this seed or subset.
AUROC is computed for normal scores with a signal that varies between runs. Coverage and width are compared with those
of the percentile bootstrap over the same resamples, with seeds and subsets resampled too. Two more results are the
fraction of null studies (two arms, three budgets, Holm correction) with a false alarm, and the coverage of the interval
of the equivalent labels, if the encoder is worth three times its labels.

    OMP_NUM_THREADS=1 python benchmarks/coverage.py --out coverage.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from medim.files import write_json
from medim.metrics import build_statistics
from medim.metrics.bootstrap import Resamples, Scores, compute_scores, draw_resamples, weighted_mean
from medim.study.statistics.intervals import compare_to_scratch, compute_interval
from medim.study.statistics.labels_saved import labels_saved
from medim.types import Array

GRIDS = ((1, 1), (1, 3), (3, 3), (3, 5), (5, 5))
SUBJECTS = (20, 70, 500)
RESAMPLES = 400
EFFECT = 0.3
MIXES = {  # variance fractions: seeds, subsets, both, subjects, seeds x subjects, subsets x subjects, all three
    "subjects": (0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    "noise": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    "both": (0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.5),
    "seeds": (0.8, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1),
    "subsets": (0.0, 0.8, 0.0, 0.1, 0.0, 0.0, 0.1),
    "runs": (0.0, 0.0, 0.8, 0.1, 0.0, 0.0, 0.1),
    "even": (0.2, 0.2, 0.1, 0.2, 0.1, 0.1, 0.1),
}
SIGNALS = {"subjects": (0.0, 0.0, 0.0), "even": (0.15, 0.15, 0.15), "runs": (0.0, 0.0, 0.4)}  # SD: seeds, subsets, both
StudySampler = Callable[[np.random.Generator], tuple[Scores, Scores, float]]  # both arms and the true difference


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=500)
    arguments = parser.parse_args()
    start, rows = time.perf_counter(), []
    for (seeds, subsets), count in product(GRIDS, SUBJECTS):
        mixes = [*((mix, False) for mix in MIXES), ("even", True)] if count < 500 else [("even", False)]
        for mix, unequal in mixes:
            study = build_mean_study(seeds, subsets, count, mix, unequal=unequal)
            name = {"statistic": "mean", "seeds": seeds, "subsets": subsets, "subjects": count, "mix": mix}
            rows.append(name | {"unequal": unequal} | measure_coverage(study, arguments.repetitions))
            print(format_result_row(rows[-1]), flush=True)
    for (seeds, subsets), count, mix in product(((1, 1), (1, 3), (3, 3)), SUBJECTS[:2], SIGNALS):
        name = {"statistic": "auroc", "seeds": seeds, "subsets": subsets, "subjects": count, "mix": mix}
        study = build_auroc_study(seeds, subsets, count, mix)
        rows.append(name | {"unequal": False} | measure_coverage(study, arguments.repetitions))
        print(format_result_row(rows[-1]), flush=True)
    alarms = {mix: measure_false_alarms(mix, arguments.repetitions) for mix in MIXES}
    labels = {mix: measure_labels_coverage(mix, arguments.repetitions // 5) for mix in MIXES}
    seconds = time.perf_counter() - start
    print(f"false alarms {alarms}", f"labels saved {labels}", f"{seconds:.0f} seconds", sep="\n")
    results = {"rows": rows, "false_alarms": alarms, "labels_saved": labels, "seconds": seconds}
    write_json(arguments.out, {"repetitions": arguments.repetitions} | results)


def format_result_row(row: dict[str, Any]) -> str:
    """Format a row as text."""
    return "\t".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values())


def measure_coverage(study: StudySampler, repetitions: int) -> dict[str, float]:
    """Measure coverage and median width of the intervals, and of those of the percentile bootstrap."""
    hits, widths = np.zeros((repetitions, 2)), np.zeros((repetitions, 2))
    for number in range(repetitions):
        rng = np.random.default_rng(number)
        ours, theirs, truth = study(rng)
        estimate = compute_interval(ours - theirs)
        for column, (low, high) in enumerate(
            ((estimate.low, estimate.high), compute_percentile_interval(ours - theirs, rng))
        ):
            hits[number, column], widths[number, column] = low <= truth <= high, high - low
    (our_coverage, percentile_coverage), (width, percentile_width) = hits.mean(axis=0), np.median(widths, axis=0)
    return {
        "coverage": float(our_coverage),
        "percentile_coverage": float(percentile_coverage),
        "width": float(width),
        "percentile_width": float(percentile_width),
    }


def compute_percentile_interval(scores: Scores, rng: np.random.Generator) -> tuple[float, float]:
    """Compute the 95 % percentile interval of the crossed bootstrap."""
    values = scores.values[..., 1:]
    shares = [rng.multinomial(n, np.full(n, 1 / n), size=values.shape[2]) / n for n in values.shape[:2]]
    low, high = np.nanpercentile(np.einsum("str,rs,rt->r", values, *shares), [2.5, 97.5])
    return float(low), float(high)


def build_mean_study(
    seeds: int, subsets: int, count: int, mix: str, *, effect: float = EFFECT, unequal: bool = False
) -> StudySampler:
    """Build a study with a mean over cases as metric, with one case per subject, or one to ten if `unequal`."""
    subjects = [str(number) for number in range(count)]
    base_resamples = draw_resamples(subjects, resamples=RESAMPLES)

    def sample_study(rng: np.random.Generator) -> tuple[Scores, Scores, float]:
        case_index = np.repeat(np.arange(count), np.minimum(rng.geometric(0.4, count), 10) if unequal else 1)
        resamples: Resamples = replace(base_resamples, case_index=case_index)
        gain, truth = draw_differences(rng, (seeds, subsets, count), mix)
        gain = gain[..., case_index] + unequal * rng.normal(0, 1, len(case_index))
        base = rng.normal(0, 3, (seeds, subsets, 1)) + rng.normal(0, 3, len(case_index))
        ours, theirs = ([[weighted_mean(c) for c in row] for row in arm] for arm in (base + effect + gain, base))
        return compute_scores(ours, resamples), compute_scores(theirs, resamples), effect + truth

    return sample_study


def draw_differences(rng: np.random.Generator, shape: tuple[int, int, int], mix: str) -> tuple[Array, float]:
    """Draw deviations (S, T, N) from the effect.

    Returns:
        The deviations, and their sum over levels that were drawn only once; this sum is part of the true effect.
    """
    axes = ((0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2))
    total, truth = np.zeros(shape), 0.0
    for level_axes, share in zip(axes, MIXES[mix], strict=True):
        size = [n if axis in level_axes else 1 for axis, n in enumerate(shape)]
        part = rng.normal(0, np.sqrt(share * np.prod(size)), size)
        total = total + part
        if 2 not in level_axes and part.size == 1:
            truth += float(part.sum())
    return total, truth


def build_auroc_study(seeds: int, subsets: int, count: int, mix: str) -> StudySampler:
    """Build a study with AUROC as metric: the signal varies between runs in one arm only; prevalence is one third."""
    shapes = ((seeds, 1, 1), (1, subsets, 1), (seeds, subsets, 1))
    labels = (np.arange(count) % 3 == 0).astype(np.intp)
    resamples = draw_resamples([str(number) for number in range(count)], resamples=RESAMPLES)

    def sample_study(rng: np.random.Generator) -> tuple[Scores, Scores, float]:
        effects = [rng.normal(0, sd, size) for sd, size in zip(SIGNALS[mix], shapes, strict=True)]
        fixed_effect = sum(float(part.sum()) for part in effects if part.size == 1)
        random_variance = sum(sd**2 for sd, part in zip(SIGNALS[mix], effects, strict=True) if part.size > 1)
        signal, subject_noise = 1.6 + sum(effects), rng.normal(0, 0.7, count)  # (S, T, 1), (N,)
        run_noise = np.sqrt(1 - 0.49) * rng.normal(size=(2, seeds, subsets, count))
        ours, theirs = (
            [[build_auroc_statistic(c, labels) for c in row] for row in level * labels + subject_noise + noise]
            for level, noise in zip((signal, 1.2), run_noise, strict=True)
        )
        truth = stats.norm.cdf((1.6 + fixed_effect) / np.sqrt(2 + random_variance)) - stats.norm.cdf(1.2 / np.sqrt(2))
        return compute_scores(ours, resamples), compute_scores(theirs, resamples), float(truth)

    return sample_study


def build_auroc_statistic(scores: Array, labels: Array) -> Any:
    """Build the AUROC of scores (N,) as a statistic."""
    return build_statistics("classification", np.stack([-scores, scores], axis=1), labels)["auroc"]


def measure_false_alarms(mix: str, repetitions: int) -> float:
    """Measure the fraction of studies without effect that report a benefit or harm in any comparison."""
    null = build_mean_study(3, 3, 20, mix, effect=0.0)
    cells = list(product(("first", "second"), ("1", "10", "100")))
    alarms = 0
    for number in range(repetitions):
        rng = np.random.default_rng(number)
        pairs = {cell: null(rng)[:2] for cell in cells}
        alarms += any(comparison.verdict != "no evidence of a benefit" for comparison in compare_to_scratch(pairs))
    return alarms / repetitions


def measure_labels_coverage(mix: str, repetitions: int) -> float:
    """Measure the coverage of the interval of the equivalent labels of 10 labels, for a true value of 30."""
    budgets, subjects = (10, 100, 1000), 20
    resamples, hits = draw_resamples([str(number) for number in range(subjects)], resamples=RESAMPLES), 0

    def sample_arm(rng: np.random.Generator, base: Array, factor: float) -> list[Scores]:
        levels = [0.1 * np.log10(factor * labels) for labels in budgets]
        runs = [level + base + 0.015 * draw_differences(rng, (3, 3, subjects), mix)[0] for level in levels]
        return [compute_scores([[weighted_mean(c) for c in row] for row in run], resamples) for run in runs]

    for number in range(repetitions):
        rng = np.random.default_rng(number)
        base = rng.normal(0, 0.3, (3, 3, 1)) + rng.normal(0, 0.3, subjects)
        equivalent = labels_saved(budgets, sample_arm(rng, base, 3), sample_arm(rng, base, 1))[0].equivalent_labels
        ends = (
            equivalent.low.value * (equivalent.low.censored == ""),
            equivalent.high.value + 1000 * (equivalent.high.censored != ""),
        )
        hits += ends[0] <= 30 <= ends[1]
    return hits / repetitions


if __name__ == "__main__":
    main()
