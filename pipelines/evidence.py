"""Shared functions of the studies in this folder: cached runs, statistics of their cases, tables and figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow.parquet
from matplotlib.figure import Figure

from medim.evaluation.cases import read_cases
from medim.evaluation.probing.label_budget import Budget
from medim.files import write_bytes, write_text
from medim.metrics import build_statistics
from medim.metrics.bootstrap import weighted_mean
from medim.metrics.metric import Statistic
from medim.migrations import read_migrated_csv, read_migrated_json
from medim.study.statistics.intervals import ConfidenceInterval
from medim.tasks.classification import class_arrays

RunSeries = list[tuple[int, float]]
MAX_POINTS = 300  # maximum number of points of a curve


def run_once(out: Path, run: Callable[..., Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the summary of a run; start or resume the run if it is not finished."""
    if (out / "summary.json").is_file():
        return read_migrated_json(out / "summary.json", "run")
    return run(out, resume=True)


def read_dice(run: Path) -> tuple[Statistic, list[str]]:
    """Read the mean Dice over classes of the validation cases as a statistic, and the subject of each case."""
    rows = read_cases(run / "cases.parquet")
    cases = {row["image"]: row["subject"] for row in rows}
    values = [np.mean([row["dice"] for row in rows if row["image"] == image]) for image in cases]
    return weighted_mean([float(v) for v in values]), list(cases.values())


def compute_auroc(rows: Sequence[dict[str, Any]]) -> Statistic:
    """Compute the AUROC of the cases of a classifier, as a statistic."""
    classes = list(dict.fromkeys(row["class"] for row in rows))
    return build_statistics("classification", *class_arrays(rows, classes))["auroc"]


def read_probe_auroc(folder: Path, features: str, fraction: float, seed: int) -> Statistic:
    """Compute the AUROC of one row of a probe, as a statistic."""
    budget = Budget(fraction=fraction).name
    rows = pyarrow.parquet.read_table(folder / "cases.parquet").to_pylist()
    probe_rows = [row for row in rows if (row["features"], row["budget"], row["seed"]) == (features, budget, seed)]
    classes = [name.removeprefix("probability_") for name in probe_rows[0] if name.startswith("probability_")]
    probabilities = np.array([[row[f"probability_{name}"] for name in classes] for row in probe_rows])
    labels = np.array([classes.index(row["label"]) for row in probe_rows])
    return build_statistics("classification", probabilities, labels)["auroc"]


def evaluate_statistic(statistic: Statistic, cases: int) -> float:
    """Evaluate a statistic on all cases with equal weights."""
    return float(statistic(np.ones((1, cases)))[0])


def read_series(run: Path) -> dict[str, RunSeries]:
    """Read the series of a run's history: training values by name, validation values by `held out <name>`."""
    series: dict[str, RunSeries] = {}
    for row in read_migrated_csv(run / "history.csv", "history"):
        if value := row["val"] or row["loss"]:
            name = f"{'held out ' if row['val'] else ''}{row['name']}"
            series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series


def format_spread(values: Sequence[float]) -> str:
    """Format mean and standard deviation: `0.812 ± 0.004`."""
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def format_difference(difference: ConfidenceInterval) -> str:
    """Format a difference with its interval: `**+0.012** [+0.004, +0.021]`."""
    return f"**{difference.value:+.3f}** [{difference.low:+.3f}, {difference.high:+.3f}]"


def format_markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- name -->` and `<!-- /name -->` in a page."""
    before, rest = page.read_text().split(f"<!-- {name} -->", 1)
    after = rest.split(f"<!-- /{name} -->", 1)[1]
    write_text(page, f"{before}<!-- {name} -->\n\n{text}\n\n<!-- /{name} -->{after}")


def draw_curves(path: Path, panels: dict[str, dict[str, RunSeries]], levels: dict[str, float]) -> None:
    """Draw curves over steps as SVG, one panel per title: `panels[title][line]`.

    A dashed line marks the level of a panel. Curves are running means over a fiftieth of their length. Their names are
    `setting, seed`, with one colour per setting.
    """
    with open_figure(1, len(panels), (3.2, 2.6)) as (figure, grid):
        for axes, (title, lines) in zip(grid.flat, panels.items(), strict=True):
            names = list(dict.fromkeys(name.rpartition(", ")[0] for name in lines))
            for name, points in lines.items():
                steps, values = np.array(points).T
                width = max(1, len(values) // 50)
                smooth = np.convolve(values, np.ones(width) / width, "valid")
                setting = name.rpartition(", ")[0]
                stride = -(-len(smooth) // MAX_POINTS)
                axes.plot(steps[width - 1 :: stride], smooth[::stride], color=f"C{names.index(setting)}", linewidth=0.9)
            if title in levels:
                axes.axhline(levels[title], color="grey", linestyle="--", linewidth=0.8)
            axes.set(title=title, xlabel="step")
            for number, name in enumerate(names):
                axes.plot([], [], color=f"C{number}", label=name)
        figure.axes[0].legend(frameon=False)
        save_svg(figure, path)


def draw_losses(path: Path, runs: Sequence[Path]) -> None:
    """Draw the losses of pretraining runs over the steps, one panel per term, with the chance level as dashed line."""
    levels: dict[str, float] = read_migrated_json(runs[0] / "summary.json", "run")["chance"]
    series = {f"seed, {number}": read_series(run) for number, run in enumerate(runs)}
    draw_curves(
        path, {term: {name: run_series[term] for name, run_series in series.items()} for term in levels}, levels
    )


@contextmanager
def open_figure(rows: int, columns: int, panel: tuple[float, float] = (2.4, 2.2)) -> Iterator[tuple[Figure, Any]]:
    """Open a figure with panels (rows, columns) of a size in inches, in the style of all figures."""
    with mpl.rc_context({"svg.hashsalt": "medim", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure as SVG within `open_figure`; the bytes are deterministic."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, buffer.getvalue())
