"""Command that audits a source of images: `audit`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medim.cli.options import (
    ImageColumnOption,
    KeepNamesOption,
    LabelColumnOption,
    LabelsOption,
    ModalityOption,
    OutOption,
    OverwriteOption,
    SplitSeedOption,
    SubjectColumnOption,
    SubjectsOption,
    WhereOption,
    require_modality,
)
from medim.cli.sources import read_source
from medim.cli.terminal import print_result
from medim.console.progress import show_progress
from medim.types import UserError

if TYPE_CHECKING:
    from medim.study.audit.source import SourceAudit

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AuditArguments:
    """Command-line arguments of `medim audit`."""

    data: Annotated[Path, typer.Argument(metavar="DATA", help="Images, an index, or a fetched public set.")]
    out: OutOption
    modality: ModalityOption = None
    labels: LabelsOption = None
    image_column: ImageColumnOption = None
    label_column: LabelColumnOption = None
    subject_column: SubjectColumnOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    false_pairs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Expected number of false pairs of look-alikes, more than 0. Larger values find more. Default: 0.001.",
        ),
    ] = None
    fail_on_contamination: Annotated[
        bool, typer.Option("--fail-on-contamination", help="Fail if look-alikes are in two splits.")
    ] = False
    split_seed: SplitSeedOption = 0
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Number of processes. Default: one per core.", min=1)
    ] = None
    overwrite: OverwriteOption = False


def audit(arguments: AuditArguments) -> None:
    """Find look-alikes across splits, and what predicts the label.

    Look-alikes are images of the same body: copies, crops, other grey levels, repeated scans. The label is predicted
    from image size, intensities, corners and file properties.
    """
    from medim.data.index.records import write_rejections
    from medim.data.lookalikes import FALSE_PAIRS, check_false_pairs
    from medim.data.parallel import count_cpus
    from medim.output_folder import REJECTIONS_FILE, output_folder
    from medim.study.audit.source import PAIRS_FILE, audit_source, write_source_audit
    from medim.study.report.source_audit import write_audit_page

    false_pairs = FALSE_PAIRS if arguments.false_pairs is None else arguments.false_pairs
    check_false_pairs(false_pairs)
    out = arguments.out
    inputs = [path for path in (arguments.data, arguments.labels, arguments.subjects) if path is not None]
    with output_folder(out, "audit", overwrite=arguments.overwrite, inputs=inputs) as folder:
        modality = arguments.modality or require_modality(arguments.data)
        index, _ = read_source(arguments, modality, out=out)
        result = audit_source(
            index,
            false_pairs=false_pairs,
            split_seed=arguments.split_seed,
            jobs=arguments.jobs or count_cpus(),
            progress=show_progress("measured"),
        )
        write_rejections(folder / REJECTIONS_FILE, [*index.rejected, *result.rejections])
        write_audit_page(folder, index, result)
        write_source_audit(folder, result)
    print_result("audit", {**_describe_audit(result), "written to": out})
    if result.leaks:
        sentence = f"look-alikes in two splits: {len(result.leaks)}"
        remedy = f"Correct the subjects or the split; {PAIRS_FILE} in --out has the pairs."
        if arguments.fail_on_contamination:
            raise UserError(f"{sentence}; --fail-on-contamination allows none. {remedy}")
        log.warning("WARNING leakage: %s. Results would be too good. %s", sentence, remedy)


def _describe_audit(result: SourceAudit) -> dict[str, object]:
    search, n_pairs, n_strangers = result.search, len(result.pairs), len(result.strangers)
    expected = "unknown number" if search.false_pairs is None else f"{search.false_pairs:g}"
    rows: dict[str, object] = {
        "images": result.images,
        "subjects": result.subjects,
        "splits": ", ".join(f"{part} {count}" for part, count in result.splits.items()),
        "look-alikes": f"pairs: {n_pairs - n_strangers} of one subject, {n_strangers} of two subjects",
        "in two splits": len(result.leaks),
        "false pairs": f"{expected} expected in {search.n_compared} comparisons",
        "correlation": f"{search.threshold:.3f} or more",
    }
    for shortcut in result.shortcuts:
        auroc = shortcut.prediction.auroc
        interval = "" if auroc["ci_low"] is None else f" [{auroc['ci_low']:.3f}, {auroc['ci_high']:.3f}]"
        value = f"AUROC {auroc['value']:.3f}{interval}" if shortcut.varies else "the same for all images"
        rows[f"class by {shortcut.name}"] = value
    return {**rows, **{f"note {number}": note for number, note in enumerate(result.notes, start=1)}}
