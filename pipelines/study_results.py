"""A study's table and curves for docs/results.md, and its page for docs/reports/; nothing is run.

python pipelines/study_results.py --study studies/study-xray --name xray --page docs/results.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evidence import drawing, markdown, save, write_section

from medim.files import write_bytes
from medim.reports.page import metric_name
from medim.study.report.format import difference, p_value, value
from medim.study.report.results import PROTOCOLS
from medim.study.report.view import Opened, open_study, title_of


def main() -> None:
    """Write the section, the figure and the copy of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the section '<name> study', the figure and the page")
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    arguments = parser.parse_args()
    study, docs = open_study(arguments.study), arguments.page.parent
    write_section(arguments.page, f"{arguments.name} study", section(study))
    draw(study, docs / "figures" / f"study-{arguments.name}.svg")
    write_bytes(docs / "reports" / f"{arguments.name}.html", (arguments.study / "report.html").read_bytes())


def section(study: Opened) -> str:
    """What the study says in labels, its table, and what it cost."""
    found = study.summary
    told = [f"- **{arm}**: {row['labels_saved']['sentence']}" for arm in _compared(study) if (row := study.of_arm(arm))]
    rows = [_row(study, arm, budget) for budget in study.budgets for arm in study.arms]
    head = ["labels", "arm", metric_name(study.metric), "minus from scratch", "p, Holm", "verdict"]
    cells = found["cells"]
    cost = (
        f"{cells['done']} of {cells['all']} cells are done: {found['cell_hours']:.1f} hours of cells, "
        f"{found['jobs']} at once; resumed inside: {found['resumed_cells']}."
    )
    return "\n\n".join(["\n".join(told), markdown(head, rows), cost])


def _compared(study: Opened) -> list[str]:
    """Fine-tuned arms, of which labels saved can be told."""
    arms = [arm for arm in study.arms if any(row["arm"] == arm for row in study.rows)]
    return [arm for arm in arms if study.of_arm(arm)["labels_saved"]]


def _row(study: Opened, arm: str, budget: str) -> list[str]:
    labels, row = f"{study.budgets[budget]:,}", study.row(arm, budget)
    name = title_of(arm) if study.row(arm, budget) is None else f"{arm}, {PROTOCOLS[study.protocol(arm)]}"
    first = [labels, name, value(study.interval(study.metric, arm, budget))]
    return first + (["", "", ""] if row is None else [difference(row), p_value(row["p_corrected"]), row["verdict"]])


def draw(study: Opened, path: Path) -> None:
    """Every arm over the label budgets; bars are 95 % intervals of the scratch twin and of fine-tuned arms."""
    with drawing(1, 1, (6.0, 3.2)) as (figure, grid):
        axes = grid[0, 0]
        for arm in study.arms:
            points = [(n, found) for b, n in study.budgets.items() if (found := study.interval(study.metric, arm, b))]
            x, y = [n for n, _ in points], [found.value for _, found in points]
            if study.protocol(arm) == "finetune":
                ends = [(found.value - found.low, found.high - found.value) for _, found in points]
                axes.errorbar(
                    x, y, list(zip(*ends, strict=True)), label=title_of(arm), marker="o", capsize=3, linewidth=1.8
                )
            else:
                axes.plot(x, y, label=f"{arm}, frozen", marker=".", linewidth=0.8, linestyle="--")
        axes.set(xscale="log", xlabel="labels", ylabel=metric_name(study.metric))
        axes.set_xticks(list(study.budgets.values()), [f"{n:,}" for n in study.budgets.values()])
        axes.minorticks_off()
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


if __name__ == "__main__":
    main()
