"""Write the table and curves of a finished study to docs/results.md, and copy its page to docs/reports/.

python pipelines/study_results.py --study studies/study-xray --name xray --page docs/results.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evidence import format_markdown_table, open_figure, save_svg, write_section

from medim.files import write_bytes
from medim.reports.page import metric_name
from medim.study.report.format import format_difference, format_estimate, format_p_value
from medim.study.report.results import PROTOCOL_LABELS
from medim.study.report.view import StudyView, arm_title, open_study


def main() -> None:
    """Write the section and the figure, and copy the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--name", required=True, help="name of the section '<name> study', the figure and the page")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    study, docs = open_study(arguments.study), arguments.page.parent
    write_section(arguments.page, f"{arguments.name} study", format_study_section(study))
    draw_study(study, docs / "figures" / f"study-{arguments.name}.svg")
    write_bytes(docs / "reports" / f"{arguments.name}.html", (arguments.study / "report.html").read_bytes())


def format_study_section(study: StudyView) -> str:
    """Format the section of a study: labels saved, table of results, and computing time."""
    summary = study.summary
    sentences = [
        f"- **{arm}**: {labels_saved['sentence']}"
        for arm in _list_comparable_arms(study)
        if (labels_saved := study.best_row(arm)["labels_saved"])
    ]
    rows = [_format_study_row(study, arm, budget) for budget in study.budgets for arm in study.arms]
    head = ["labels", "arm", metric_name(study.metric), "difference to scratch", "p, Holm", "verdict"]
    cells = summary["cells"]
    cost = (
        f"{cells['done']} of {cells['all']} cells are done: {summary['cell_hours']:.1f} hours of cells, "
        f"{summary['jobs']} at once; resumed inside: {summary['n_resumed_cells']}."
    )
    return "\n\n".join(["\n".join(sentences), format_markdown_table(head, rows), cost])


def _list_comparable_arms(study: StudyView) -> list[str]:
    """List the fine-tuned arms with an estimate of the labels saved."""
    arms = [arm for arm in study.arms if any(row["arm"] == arm for row in study.rows)]
    return [arm for arm in arms if study.best_row(arm)["labels_saved"]]


def _format_study_row(study: StudyView, arm: str, budget: str) -> list[str]:
    labels, row = f"{study.budgets[budget]:,}", study.find_row(arm, budget)
    name = (
        arm_title(arm) if study.find_row(arm, budget) is None else f"{arm}, {PROTOCOL_LABELS[study.get_protocol(arm)]}"
    )
    cells = [labels, name, format_estimate(study.get_interval(study.metric, arm, budget))]
    return cells + (
        ["", "", ""] if row is None else [format_difference(row), format_p_value(row["p_corrected"]), row["verdict"]]
    )


def draw_study(study: StudyView, path: Path) -> None:
    """Draw all arms over the label budgets; bars are 95 % intervals of from-scratch and fine-tuned arms."""
    with open_figure(1, 1, (6.0, 3.2)) as (figure, grid):
        axes = grid[0, 0]
        for arm in study.arms:
            points = [
                (n, estimate)
                for budget, n in study.budgets.items()
                if (estimate := study.get_interval(study.metric, arm, budget))
            ]
            x, y = [n for n, _ in points], [estimate.value for _, estimate in points]
            if study.get_protocol(arm) == "finetune":
                ends = [(estimate.value - estimate.low, estimate.high - estimate.value) for _, estimate in points]
                axes.errorbar(
                    x, y, list(zip(*ends, strict=True)), label=arm_title(arm), marker="o", capsize=3, linewidth=1.8
                )
            else:
                axes.plot(x, y, label=f"{arm}, frozen", marker=".", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel="labels", ylabel=metric_name(study.metric))
        axes.set_xticks(list(study.budgets.values()), [f"{n:,}" for n in study.budgets.values()])
        axes.minorticks_off()
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save_svg(figure, path)


if __name__ == "__main__":
    main()
