"""Is one arm better than another? Differences of paired runs, with an interval over all that was drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medim.evaluation.binary import Statistic
from medim.evaluation.metrics import RESAMPLES, Metric

Cells = Sequence[Sequence[Statistic]]


def paired_difference(
    ours: Cells, theirs: Cells, subjects: Sequence[str], *, seed: int = 0, resamples: int = RESAMPLES
) -> Metric:
    """Mean difference of two arms over a grid of runs, and its 95 % percentile interval.

    Pretraining seeds, label subsets and subjects are resampled at once (crossed bootstrap; Owen 2007,
    arXiv 0711.4047), each with replacement, and the two arms always together: what both share cancels.

    Args:
        ours: a statistic of the cases for each seed and label subset, [S][T]: weights (R, N) to values (R,).
        theirs: likewise, of the runs that ours are paired with.
        subjects: (N,) whose case it is.
        seed: of the draw.
        resamples: number of them.

    Returns:
        `value` (the mean of the S x T differences), `ci_low`, `ci_high`, and `n`, the number of pairs.
    """
    count, places = len(set(subjects)), {s: p for p, s in enumerate(dict.fromkeys(subjects))}
    of_case = np.array([places[subject] for subject in subjects], dtype=np.intp)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)  # (R, subjects)
    weights = np.concatenate([np.ones((1, len(subjects))), drawn[:, of_case]])  # (1 + R, N)
    pairs = [[a(weights) - b(weights) for a, b in zip(*rows, strict=True)] for rows in zip(ours, theirs, strict=True)]
    differences = np.array(pairs)  # (S, T, 1 + R)
    shares = [rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n for n in differences.shape[:2]]
    means = np.einsum("str,rs,rt->r", differences[..., 1:], *shares)
    low, high = np.nanpercentile(means, [2.5, 97.5])
    return {
        "value": float(differences[..., 0].mean()),
        "ci_low": float(low),
        "ci_high": float(high),
        "n": int(np.prod(differences.shape[:2])),
    }


def mean_of(values: Sequence[float]) -> Statistic:
    """The weighted mean of a value a case (N,), as a statistic."""
    column = np.asarray(values, dtype=np.float64)
    return lambda weights: weights @ column / weights.sum(axis=1)
