"""Demo of the whole workflow on the built-in cohort, in one process; `make demo` runs it.

Simulated subjects are written as NIfTI, one of them also as DICOM. An encoder is pretrained on them without labels and
fine-tuned on five labelled volumes. A network of the same architecture is trained from scratch. Both are evaluated, and
the fine-tuned network is exported and run on the DICOM series.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from medim.data.example.cohort import make_example
from medim.data.index.index import build_index
from medim.evaluation.evaluate import EvaluateOptions, evaluate
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.files import write_json
from medim.predict.predict import predict
from medim.reports.report import write_report_page
from medim.training.finetune.config import resolve_finetune_config as finetune_config
from medim.training.finetune.run import finetune
from medim.training.pretrain.config import resolve_pretrain_config as pretrain_config
from medim.training.pretrain.run import pretrain

LABELLED = 5
SPACING = 4.0  # mm, as in the preset


def main() -> None:
    """Run and time all parts, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or cuda; cuda is not tested")
    arguments = parser.parse_args()
    if arguments.accelerator in ("cuda", "gpu") and not torch.cuda.is_available():
        parser.error(f"--accelerator {arguments.accelerator}: no CUDA device is available. Run `medim doctor`.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("medim").setLevel(logging.INFO)
    out, console, seconds = arguments.out, Console(), {}
    times = [time.perf_counter()]

    def report_part(part: str, result: Any) -> Any:
        times.append(time.perf_counter())
        seconds[part] = times[-1] - times[-2]
        console.rule(f"{part}: {seconds[part]:.0f} s", align="left")
        return result

    common = {"store": out / "store", "accelerator": arguments.accelerator, "overwrite": True}

    make_example(out / "cohort", subjects=24, spacing=SPACING, formats=("nifti",), overwrite=True)
    series = make_example(out / "series", subjects=1, spacing=SPACING, formats=("dicom",), overwrite=True)
    report_part("example", series)
    index = report_part("index", build_index(out / "cohort" / "nifti", "mri"))
    report_part("pretrain", pretrain(pretrain_config("mri-demo", index=index), index, out / "pretrain", **common))
    schedule = finetune_config("segmentation", "mri", out / "pretrain", None, index=index)
    budget = {"encoder": out / "pretrain", "labelled": LABELLED, **common}
    report_part("finetune", finetune(schedule, index, out / "finetune", **budget))
    report_part("from scratch", finetune(schedule, index, out / "scratch", from_scratch=True, **budget))
    arms = {"pretrained": "finetune", "from scratch": "scratch"}
    again = EvaluateOptions(overwrite=True)
    results = {arm: evaluate(out / run, index, out / f"evaluate-{run}", again) for arm, run in arms.items()}
    report_part("evaluate", None)
    package = report_part("export", export(out / "finetune", out / "package", ExportOptions(overwrite=True)))
    report_part("predict", predict(package, [series / "dicom" / "scan-501"], out / "prediction", overwrite=True))
    page = report_part("report", write_report_page(out))
    write_json(out / "seconds.json", seconds)

    console.print(_format_dice_table(results), f"report page  {page}", f"package      {out / 'package'}", sep="\n")
    console.print(
        "\nNext, on your own images:",
        "  medim index YOUR_FOLDER --modality mri --out index",
        "  medim pretrain --modality mri --data YOUR_FOLDER --out runs/mine",
        "  medim finetune --task segmentation --data YOUR_LABELLED --encoder runs/mine --labelled 20 --out runs/model",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )


def _format_dice_table(results: dict[str, Any]) -> Table:
    names = [name for name in results["pretrained"]["metrics"] if name.startswith("dice")]
    table = Table("start", *names, title=f"Dice on held-out subjects, {LABELLED} labelled volumes (95 % interval)")
    for arm, result in results.items():
        cells = [result["metrics"][name] for name in names]
        table.add_row(arm, *(f"{c['value']:.3f} [{c['ci_low']:.3f}, {c['ci_high']:.3f}]" for c in cells))
    return table


if __name__ == "__main__":
    main()
