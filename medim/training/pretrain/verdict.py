"""One word on a run, why, and what to try next. docs/concepts/verdicts.md says it at length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

Verdict = Literal["learning", "at-chance", "collapsed", "diverged"]
FLAT_RANK, FLAT_SPREAD = 1.5, 0.05  # RankMe and feature_std below which summaries have collapsed
SHRUNK = 0.1  # of the encoder's first size, below which a run that learns nothing has collapsed
ADVICE: dict[Verdict, str] = {
    "learning": "",
    "at-chance": "Look at the sample views (is anything left in them?), raise the learning rate tenfold, then the "
    "batch size; make crops larger or the augmentation milder; a long run may just need more steps.",
    "collapsed": "Look whether the images are blank or alike after preprocessing; lower weight_decay; lower the "
    "learning rate; add an objective that tells images apart (local_dim, simclr).",
    "diverged": "Lower the learning rate tenfold; set gradient_clip=1 and warmup_steps; with 16-mixed precision, take "
    "bf16-mixed or 32-true.",
}


class Finding(NamedTuple):
    """A verdict and the figures it stands on."""

    verdict: Verdict
    why: str


def judge(
    levels: Mapping[str, float],
    held_out: Mapping[str, tuple[float, float]],
    *,
    broken: str = "",
    strayed: str = "",
    flat: str = "",
    shrunk: str = "",
) -> Finding:
    """Weigh a run's last held-out losses.

    `learning`: every term is below its level by at least 5 % of it (of 1 nat where it is 0) and three standard errors.
    `diverged`: a loss is no number, or a term is above its level by as much, or a training loss strayed far above it
    and the run has not learnt since. `collapsed`: the held-out summaries lie on one point or line, or nothing is learnt
    and the encoder's weights have shrunk. Else `at-chance`.

    Args:
        levels: term to its chance level, or to its first loss where no term has one.
        held_out: term to mean and standard error of its held-out loss.
        broken: how a training loss stopped being a number; empty: none did.
        strayed: how a training loss stayed far above chance; empty: none did.
        flat: how the summaries have collapsed; empty: they have not.
        shrunk: how the encoder's weights have shrunk; empty: they have not.
    """
    if broken:
        return Finding("diverged", broken)
    told = []
    for name, level in levels.items():
        if name in held_out:
            mean, error = held_out[name]
            gain, need = level - mean, max(0.05 * (abs(level) or 1.0), 3 * error)
            text = f"{name}: {mean:.3g} held out, {level:.3g} at chance, a gain of {need:.2g} needed"
            told.append((gain, need, text))
    above = [text for gain, need, text in told if not gain >= -need]
    if above or not all(math.isfinite(gain) for gain, _, _ in told):
        return Finding("diverged", "; ".join(above))
    learnt = bool(told) and all(gain >= need for gain, need, _ in told)
    if strayed and (flat or not learnt):
        return Finding("diverged", strayed)
    if flat or (shrunk and not learnt):
        return Finding("collapsed", flat or shrunk)
    short = [text for gain, need, text in told if gain < need] or ["nothing was measured on held-out subjects"]
    return Finding("learning", "; ".join(t for _, _, t in told)) if learnt else Finding("at-chance", "; ".join(short))


def flatness(rankme: float, feature_std: float) -> str:
    """How summaries have collapsed, or nothing where they have not.

    Args:
        rankme: their effective rank; NaN: not measured.
        feature_std: their spread, 1 isotropic.
    """
    if rankme < FLAT_RANK or feature_std < FLAT_SPREAD:
        return (
            f"held-out summaries: RankMe {rankme:.3g} (collapsed below {FLAT_RANK}), feature_std {feature_std:.2g} "
            f"(collapsed below {FLAT_SPREAD})"
        )
    return ""


def shrinkage(size: float, at_start: float) -> str:
    """How far an encoder's weights have shrunk, as they do under too much weight decay, or nothing where they have not.

    RankMe and feature_std do not see it: they look at directions, which the last noise of a gradient still gives.

    Args:
        size: Euclidean norm of all weights that decay; NaN: not measured.
        at_start: the same before the first step.
    """
    if size < SHRUNK * at_start:
        return (
            f"encoder: the norm of its weights has shrunk from {at_start:.3g} to {size:.3g} (collapsed below "
            f"{SHRUNK:.0%} of the first where nothing is learnt)"
        )
    return ""
