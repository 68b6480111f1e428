"""Health of a pretraining run over its steps: figures from `history.csv`."""

from __future__ import annotations

import math
from pathlib import Path

from medim.reports import figures
from medim.reports.history_rows import read_history_rows
from medim.reports.page import Banner
from medim.reports.svg import Figure

StepValues = dict[str, list[tuple[int, float]]]
GRADIENT_PREFIX = "gradient_norm/"
VERDICT_BANNERS: dict[str, Banner] = {
    "learning": Banner(
        "good",
        "Learning",
        "On the validation subjects, every objective with a chance level ended below it by at least 0.1 nat "
        "and three standard errors.",
    ),
    "weak": Banner(
        "care",
        "Weak",
        "On the validation subjects, every objective is better than an uninformed network, but at least one by "
        "less than 0.1 nat. Train longer before you use this encoder.",
    ),
    "at-chance": Banner(
        "care",
        "At chance",
        "On the validation subjects, at least one objective is not clearly better than an uninformed network. "
        "Train longer, or check batch size, crops and learning rate before you use this encoder.",
    ),
    "collapsed": Banner(
        "bad",
        "Collapsed",
        "The summaries of different images are almost equal and carry no information. Do not use this encoder.",
    ),
    "diverged": Banner(
        "bad",
        "Diverged",
        "A loss became NaN or infinite, or ended above its chance level. Lower the learning rate. "
        "Do not use this encoder.",
    ),
    "not-measured": Banner(
        "care",
        "Not measured",
        "The run has no validation losses, so there is no evidence that the encoder has learnt. "
        "Validation needs at least 2 subjects.",
    ),
}


def plot_health(path: Path) -> list[Figure]:
    """Plot RankMe, probe, alignment and uniformity on validation subjects, and gradient norms, if they were measured.

    Args:
        path: path of `history.csv`.
    """
    points_by_name = _read_points(path)
    plots = [
        figures.line_plot({name: points_by_name[name]}, label, caption)
        for name, label, caption in (
            ("rankme", "RankMe", "Effective rank of validation summaries"),
            ("probe", "AUROC", "Online probe on validation subjects"),
        )
        if points_by_name.get(name)
    ]
    views = {name: points_by_name[name] for name in ("alignment", "uniformity") if points_by_name.get(name)}
    if views:
        plots.append(figures.line_plot(views, "lower is better", "Alignment and uniformity on validation subjects"))
    norms = {
        name.removeprefix(GRADIENT_PREFIX): points
        for name, points in points_by_name.items()
        if name.startswith(GRADIENT_PREFIX)
    }
    norms = {name: points for name, points in norms.items() if all(value > 0 for _, value in points)}
    if norms:
        first_norms = dict(list(norms.items())[:3])  # the encoder's norm, and as many as there are colours
        plots.append(figures.line_plot(first_norms, "norm", "Gradient norm before clipping", log=True))
    return plots


def _read_points(path: Path) -> StepValues:
    points_by_name: StepValues = {}
    if not path.is_file():
        return points_by_name
    for row in read_history_rows(path):
        value = row.val if row.val is not None or not row.name.startswith(GRADIENT_PREFIX) else row.loss
        if value is not None and math.isfinite(value):
            points_by_name.setdefault(row.name, []).append((row.step, value))
    return points_by_name
