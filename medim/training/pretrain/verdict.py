"""Verdict on a pretraining run, with reason and advice; see docs/concepts/verdicts.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

TrainingVerdict = Literal["learning", "weak", "at-chance", "collapsed", "diverged", "not-measured"]
MIN_GAIN = 0.1  # nats below chance from which a term is learnt
MIN_WEAK_GAIN = 0.01  # nats; smaller gains over chance are noise of the rounding and of few batches
RELATIVE_MARGIN = 0.05  # of the level: excess of a diverged loss, and gain of a loss without a chance level
MIN_RANKME, MIN_FEATURE_STD = 1.5, 0.05  # summaries below these limits have collapsed
MIN_NORM_RATIO = 0.1  # ratio of final to initial weight norm; below it, a run that learns nothing has collapsed
ADVICE: dict[TrainingVerdict, str] = {
    "learning": "",
    "weak": "Train longer; if the validation loss no longer falls, increase the learning rate or the batch size.",
    "at-chance": "Check that the views in figures/views.png show anatomy; increase the learning rate tenfold, then the "
    "batch size; use larger crops or weaker augmentation; a long run may only need more steps.",
    "collapsed": "Check that the views in figures/views.png are not blank or identical; lower weight_decay; lower the "
    "learning rate; add an objective that discriminates images (local_dim, simclr).",
    "diverged": "Lower the learning rate tenfold; set gradient_clip=1 and warmup_steps; with 16-mixed precision, use "
    "bf16-mixed or 32-true instead.",
    "not-measured": "Add subjects: validation needs at least 2.",
}


class VerdictReport(NamedTuple):
    """Verdict with the figures that explain it."""

    verdict: TrainingVerdict
    why: str


def judge_run(
    levels: Mapping[str, float],
    held_out: Mapping[str, tuple[float, float]],
    *,
    has_chance: bool = True,
    non_finite: str = "",
    above_chance: str = "",
    collapse: str = "",
    weight_shrinkage: str = "",
) -> VerdictReport:
    """Determine the verdict from the last validation losses of a run.

    `learning`: every term is below its level by at least 0.1 nat and three standard errors. The margin does not depend
    on the level, log(classes), which is a property of the grid of locations and not of the encoder. `weak`: every term
    is below its level by three standard errors and 0.01 nat, but a term by less than 0.1 nat. `diverged`: a loss is not
    finite, or a term is above its level by 5 % of it (of 1 nat if the level is 0) and three standard errors, more than
    for random weights, or a training loss was far above its level and the run has not learnt since. `collapsed`: the
    validation summaries have collapsed to a point or line, or a term is not learnt and the weights of the encoder have
    shrunk. `not-measured`: no term has a validation loss, and the run has not diverged.
    `at-chance`: all other cases.

    Args:
        levels: chance level by term in nats, or first loss by term if no term has a chance level.
        held_out: mean and standard error of the validation loss by term.
        has_chance: whether the levels are chance levels. If not, the margin is 5 % of the level, as the losses have
            no common unit.
        non_finite: description of a training loss that was not finite, or empty.
        above_chance: description of a training loss that stayed far above chance, or empty.
        collapse: description of a collapse of the summaries, or empty.
        weight_shrinkage: description of a shrinkage of the encoder weights, or empty.

    Examples:
        >>> judge_run({"local_dim": 5.0}, {"local_dim": (3.1, 0.1)})
        VerdictReport(verdict='learning', why='local_dim: 3.1 held out, 5 at chance: gain 1.9, needed 0.3')
    """
    if non_finite:
        return VerdictReport("diverged", non_finite)
    measured_terms = [name for name in levels if name in held_out]
    gains = [_measure_gain(name, levels[name], *held_out[name], has_chance) for name in measured_terms]
    above = [one.text for one in gains if not one.gain >= -one.tolerance]
    if above or not all(math.isfinite(one.gain) for one in gains):
        return VerdictReport("diverged", "; ".join(above))
    is_learning = bool(gains) and all(one.gain >= one.need for one in gains)
    if above_chance and (collapse or not is_learning):
        return VerdictReport("diverged", above_chance)
    if collapse or (weight_shrinkage and not is_learning):
        return VerdictReport("collapsed", collapse or weight_shrinkage)
    if not gains:
        return VerdictReport("not-measured", "there is no validation loss")
    if is_learning:
        return VerdictReport("learning", "; ".join(one.text for one in gains))
    is_weak = all(one.gain >= max(MIN_WEAK_GAIN, 3 * one.error) for one in gains)
    return VerdictReport(
        "weak" if is_weak else "at-chance", "; ".join(one.text for one in gains if one.gain < one.need)
    )


class _Gain(NamedTuple):
    """Gain of a term over its level, in the unit of its loss."""

    gain: float
    need: float
    tolerance: float
    error: float
    text: str


def _measure_gain(name: str, level: float, mean: float, error: float, has_chance: bool) -> _Gain:
    gain, tolerance = level - mean, max(RELATIVE_MARGIN * (abs(level) or 1.0), 3 * error)
    if not has_chance:
        need = tolerance
        text = f"{name}: {mean:.3g} held out, {level:.3g} at the first step: gain {gain:.2g}, needed {need:.2g}"
        return _Gain(gain, need, tolerance, error, text)
    need = max(MIN_GAIN, 3 * error)
    text = f"{name}: {mean:.3g} held out, {level:.3g} at chance: gain {gain:.2g}, needed {need:.2g}"
    return _Gain(gain, need, tolerance, error, text)


def describe_shortfall(steps: int, preset_steps: int) -> str:
    """Describe a run that is shorter than its preset; empty if it is not.

    Examples:
        >>> describe_shortfall(40, 700)
        'This run has 40 of the 700 steps of its preset, so first train for all of them.'
    """
    if steps >= preset_steps:
        return ""
    return f"This run has {steps} of the {preset_steps} steps of its preset, so first train for all of them."


def describe_collapse(rankme: float, feature_std: float) -> str:
    """Describe the collapse of summaries; empty if they have not collapsed.

    Args:
        rankme: effective rank of the summaries; NaN if not measured.
        feature_std: spread of the summaries; 1 is isotropic.
    """
    if rankme < MIN_RANKME or feature_std < MIN_FEATURE_STD:
        return (
            f"held-out summaries: RankMe {rankme:.3g} (collapsed below {MIN_RANKME}), feature_std {feature_std:.2g} "
            f"(collapsed below {MIN_FEATURE_STD})"
        )
    return ""


def describe_shrinkage(size: float, at_start: float) -> str:
    """Describe the shrinkage of the encoder weights under excessive weight decay; empty if they have not shrunk.

    RankMe and feature_std do not detect it: they measure directions, which the remaining gradient noise still provides.

    Args:
        size: Euclidean norm of all weights with weight decay; NaN if not measured.
        at_start: the same norm before the first step.
    """
    if size < MIN_NORM_RATIO * at_start:
        return (
            f"encoder: the norm of its weights has shrunk from {at_start:.3g} to {size:.3g} (collapsed below "
            f"{MIN_NORM_RATIO:.0%} of the first if nothing is learnt)"
        )
    return ""
