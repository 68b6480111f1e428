"""One word on a run, why, and what to try next. docs/concepts/verdicts.md says it at length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

TrainingVerdict = Literal["learning", "at-chance", "collapsed", "diverged"]
MIN_RANKME, MIN_FEATURE_STD = 1.5, 0.05  # RankMe and feature_std below which summaries have collapsed
MIN_NORM_RATIO = 0.1  # of the encoder's first size, below which a run that learns nothing has collapsed
ADVICE: dict[TrainingVerdict, str] = {
    "learning": "",
    "at-chance": "Look at the sample views (is anything left in them?), raise the learning rate tenfold, then the "
    "batch size; make crops larger or the augmentation milder; a long run may just need more steps.",
    "collapsed": "Look whether the images are blank or alike after preprocessing; lower weight_decay; lower the "
    "learning rate; add an objective that tells images apart (local_dim, simclr).",
    "diverged": "Lower the learning rate tenfold; set gradient_clip=1 and warmup_steps; with 16-mixed precision, take "
    "bf16-mixed or 32-true.",
}


class VerdictReport(NamedTuple):
    """A verdict and the figures it stands on."""

    verdict: TrainingVerdict
    why: str


def judge_run(
    levels: Mapping[str, float],
    held_out: Mapping[str, tuple[float, float]],
    *,
    non_finite: str = "",
    above_chance: str = "",
    collapse: str = "",
    weight_shrinkage: str = "",
) -> VerdictReport:
    """Weigh a run's last held-out losses.

    `learning`: every term is below its level by at least 5 % of it (of 1 nat where it is 0) and three standard errors.
    `diverged`: a loss is no number, or a term is above its level by as much, or a training loss strayed far above it
    and the run has not learnt since. `collapsed`: the held-out summaries lie on one point or line, or nothing is learnt
    and the encoder's weights have shrunk. Else `at-chance`.

    Args:
        levels: term to its chance level, or to its first loss where no term has one.
        held_out: term to mean and standard error of its held-out loss.
        non_finite: how a training loss stopped being a number; empty: none did.
        above_chance: how a training loss stayed far above chance; empty: none did.
        collapse: how the summaries have collapsed; empty: they have not.
        weight_shrinkage: how the encoder's weights have shrunk; empty: they have not.
    """
    if non_finite:
        return VerdictReport("diverged", non_finite)
    gains = []
    for name, level in levels.items():
        if name in held_out:
            mean, error = held_out[name]
            gain, need = level - mean, max(0.05 * (abs(level) or 1.0), 3 * error)
            text = f"{name}: {mean:.3g} held out, {level:.3g} at chance, a gain of {need:.2g} needed"
            gains.append((gain, need, text))
    above = [text for gain, need, text in gains if not gain >= -need]
    if above or not all(math.isfinite(gain) for gain, _, _ in gains):
        return VerdictReport("diverged", "; ".join(above))
    is_learning = bool(gains) and all(gain >= need for gain, need, _ in gains)
    if above_chance and (collapse or not is_learning):
        return VerdictReport("diverged", above_chance)
    if collapse or (weight_shrinkage and not is_learning):
        return VerdictReport("collapsed", collapse or weight_shrinkage)
    shortfalls = [text for gain, need, text in gains if gain < need] or ["nothing was measured on held-out subjects"]
    return (
        VerdictReport("learning", "; ".join(t for _, _, t in gains))
        if is_learning
        else VerdictReport("at-chance", "; ".join(shortfalls))
    )


def describe_collapse(rankme: float, feature_std: float) -> str:
    """How summaries have collapsed, or nothing where they have not.

    Args:
        rankme: their effective rank; NaN: not measured.
        feature_std: their spread, 1 isotropic.
    """
    if rankme < MIN_RANKME or feature_std < MIN_FEATURE_STD:
        return (
            f"held-out summaries: RankMe {rankme:.3g} (collapsed below {MIN_RANKME}), feature_std {feature_std:.2g} "
            f"(collapsed below {MIN_FEATURE_STD})"
        )
    return ""


def describe_shrinkage(size: float, at_start: float) -> str:
    """How far an encoder's weights have shrunk, as they do under too much weight decay, or nothing where they have not.

    RankMe and feature_std do not see it: they look at directions, which the last noise of a gradient still gives.

    Args:
        size: Euclidean norm of all weights that decay; NaN: not measured.
        at_start: the same before the first step.
    """
    if size < MIN_NORM_RATIO * at_start:
        return (
            f"encoder: the norm of its weights has shrunk from {at_start:.3g} to {size:.3g} (collapsed below "
            f"{MIN_NORM_RATIO:.0%} of the first where nothing is learnt)"
        )
    return ""
