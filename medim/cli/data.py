"""Commands that fetch, index and preprocess images: `example`, `fetch`, `index`, `locate`, `preprocess`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from medim.cli.options import (
    MODALITY_HELP,
    ConfigOption,
    ImageColumnOption,
    KeepNamesOption,
    LabelColumnOption,
    LabelsOption,
    ModalityOption,
    OutOption,
    OverwriteOption,
    PreprocessingJobsOption,
    SeedOption,
    SubjectColumnOption,
    SubjectsOption,
    WhereOption,
    check_modality,
    require_modality,
)
from medim.cli.sources import name_label_columns
from medim.cli.terminal import console, escape_control_characters, print_result, print_source, wide_console
from medim.console.progress import show_progress
from medim.types import Modality, UsageError, UserError

if TYPE_CHECKING:
    from medim.data.public.catalog import PublicSet


def example(
    out: OutOption,
    subjects: Annotated[int, typer.Option(metavar="N", help="Number of subjects.")] = 24,
    spacing: Annotated[float, typer.Option(metavar="MM", help="Voxel size in mm.")] = 2.0,
    formats: Annotated[str, typer.Option("--format", metavar="FORMAT", help="nifti, dicom, or nifti,dicom.")] = "nifti",
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a simulated cohort of brain MRI (NIfTI or DICOM)."""
    from medim.data.example.cohort import make_example

    format_names: Any = formats.split(",")
    make_example(
        out,
        subjects=subjects,
        spacing=spacing,
        formats=format_names,
        seed=seed,
        overwrite=overwrite,
        progress=show_progress("wrote"),
    )
    print_result("example", {"subjects": subjects, "written to": out})


def fetch(
    name: Annotated[str | None, typer.Argument(help="Name of a public data set.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FOLDER", help="Folder for the data set. Default: the cache, from which --data NAME reads."
        ),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="List the public data sets with their terms and checksums.")
    ] = False,
) -> None:
    """Download or verify a public data set.

    A download that was interrupted is continued.
    """
    from medim.data.public.catalog import PUBLIC_SETS
    from medim.data.public.fetch import fetch_public_set as fetch_set

    if list_:
        _print_public_sets(PUBLIC_SETS)
        return
    if name is None:
        raise UsageError("expected the name of a public set: medim fetch NAME. List the names with: medim fetch --list")
    fetch_result = fetch_set(name, out, progress=show_progress("fetched", "MB", 10**6))
    note = PUBLIC_SETS[fetch_result.manifest["name"]].note
    rows = {
        "files": fetch_result.file_count,
        "licence": fetch_result.manifest["licence"],
        "cite": fetch_result.manifest["citation"],
    }
    state = "written to" if fetch_result.is_new else "was there, every file as it was fetched"
    print_result("fetch", {**rows, **({"note": note} if note else {}), state: fetch_result.folder})


def _print_public_sets(public_sets: Mapping[str, PublicSet]) -> None:
    """Print a table of the public data sets, and a line for each with checksums and notes."""
    names = ("name", "modality", "images", "size", "licence", "for", "content")
    table = Table(*names, box=None, pad_edge=False)
    for name, public_set in public_sets.items():
        count = f"{public_set.images:,}" if public_set.images else "unknown"
        size = f"{public_set.size / 1e6:,.0f} MB" if public_set.size else "unknown"
        table.add_row(name, public_set.modality, count, size, public_set.licence, public_set.purpose, public_set.title)
    (console if sys.stdout.isatty() else wide_console).print(table, markup=False, highlight=False)
    for name, public_set in public_sets.items():
        sums = f"md5 from {public_set.sums}" if public_set.sums else "no published checksum, sha256 recorded"
        note = f"; {public_set.note}" if public_set.note else ""
        console.print(f"{name}: {sums}{note}", markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class IndexArguments:
    """Command-line arguments of `medim index`."""

    sources: Annotated[list[Path], typer.Argument(help="Image files, folders, or names of fetched public sets.")]
    modality: Annotated[Modality, typer.Option(help=MODALITY_HELP)]
    out: OutOption
    labels: LabelsOption = None
    image_column: ImageColumnOption = None
    label_column: LabelColumnOption = None
    subject_column: SubjectColumnOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    jobs: Annotated[
        int | None, typer.Option(metavar="N", help="Number of processes. Default: one per core.", min=1)
    ] = None
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Open every file, including files that have not changed.")
    ] = False
    overwrite: OverwriteOption = False


def index(arguments: IndexArguments) -> None:
    """List the images of a source, and the rejected files.

    Each rejected file is listed with the reason.
    """
    from medim.data.index.index import AllRejectedError, build_index
    from medim.data.index.selection import parse_condition
    from medim.data.loading.source_summary import describe_source, warn_mixed_sizes
    from medim.data.parallel import count_cpus
    from medim.data.public.fetch import resolve_data_argument
    from medim.output_folder import REJECTIONS_FILE, output_folder, write_rejection_file

    out, overwrite = arguments.out, arguments.overwrite
    labels = name_label_columns(arguments)
    if arguments.where is not None:
        parse_condition(arguments.where)  # a mistake in it shows before images are read
    source_paths = [resolve_data_argument(source, arguments.modality) for source in arguments.sources]
    inputs = [path for path in (*source_paths, arguments.labels, arguments.subjects) if path is not None]
    try:
        with output_folder(out, "index", overwrite=overwrite, inputs=inputs) as folder:
            image_index = build_index(
                source_paths,
                arguments.modality,
                labels=labels,
                subjects=arguments.subjects,
                keep_names=arguments.keep_names,
                jobs=arguments.jobs or count_cpus(),
                remember=not arguments.no_cache,
                progress=show_progress("inspected", "files"),
            )
            image_index.log_unidentified()
            image_index = image_index if arguments.where is None else image_index.select(arguments.where)
            image_index.write(folder, final_folder=out)
    except AllRejectedError as error:
        write_rejection_file(out, "index", error.write_rejections)
        raise
    counts = {
        "images": len(image_index.records),
        "subjects": len({r.subject for r in image_index.records}),
        "rejected": len(image_index.rejected),
        "files opened": image_index.n_inspected,
    }
    warn_mixed_sizes(image_index)
    details = describe_source(image_index, rejections_file=out / REJECTIONS_FILE)
    print_result("index", {**counts, **details, "written to": out})


def locate(
    source: Annotated[Path, typer.Argument(help="An index, or the folder of images that the keys are from.")],
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys of images, as in the column image.")],
) -> None:
    """Print the files of image keys.

    Names of files and folders that may identify people are pseudonyms in every other output.
    """
    from medim.data.index.locate import locate_files

    for path in [path for key in keys for path in locate_files(source, key)]:
        console.print(escape_control_characters(str(path)), markup=False, highlight=False, soft_wrap=True)


def preprocess(
    source: Annotated[Path, typer.Argument(help="Images, or an index.")],
    out: OutOption,
    modality: ModalityOption = None,
    config: ConfigOption = None,
    keep_names: KeepNamesOption = False,
    where: WhereOption = None,
    jobs: PreprocessingJobsOption = 1,
) -> None:
    """Preprocess images into a store.

    `pretrain` and `finetune` read images from it.
    """
    from medim.data.loading.cohort import open_cohort
    from medim.data.loading.quality_table import add_record_flags, count_flags, flag_images, write_quality
    from medim.data.source import open_source
    from medim.output_folder import REJECTIONS_FILE
    from medim.training.pretrain.config import resolve_pretrain_config

    if out.exists() and not (out / "store.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: expected a store, or an empty or new folder. Choose another --out.")
    preset = config or modality or require_modality(source)
    settings = resolve_pretrain_config(preset)
    check_modality(settings.modality, modality, config)
    image_index, _ = open_source(source, settings.modality, keep_names=keep_names)
    image_index = image_index if where is None else image_index.select(where)
    print_source(image_index, rejections_file=out / REJECTIONS_FILE)
    steps = resolve_pretrain_config(preset, index=image_index).preprocessing
    cohort = open_cohort(image_index, image_index.records, steps, split_seed=0, store=out, jobs=jobs)
    rows = flag_images(image_index.records, cohort.quality_metrics())
    write_quality(out, rows)
    replace(image_index, records=add_record_flags(image_index.records, rows)).write(out)
    n_rejected = len(image_index.rejected) + len(cohort.rejections)
    print_result(
        "preprocess", {"images": len(cohort.keys), "rejected": n_rejected, **count_flags(rows), "written to": out}
    )
