"""The commands that bring images and ready them: parse, make one call, print what came out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from medim.cli.options import Config, Labels, Out, Overwrite, Seed, Subjects
from medim.cli.terminal import console, progress, show
from medim.types import Modality, UsageError, UserError


def example(
    out: Out,
    subjects: Annotated[int, typer.Option(help="Number of subjects.")] = 24,
    spacing: Annotated[float, typer.Option(help="Voxel size in mm.")] = 2.0,
    formats: Annotated[str, typer.Option("--format", help="nifti, dicom, or both with a comma.")] = "nifti",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the built-in cohort as files: simulated subjects from the MNI152 template."""
    from medim.data.example.cohort import make_example
    from medim.files import fresh_folder

    fresh_folder(out, overwrite=overwrite)
    chosen: Any = formats.split(",")
    folder = make_example(
        out, subjects=subjects, spacing=spacing, formats=chosen, seed=seed, progress=progress("wrote")
    )
    show("example", {"subjects": subjects, "written to": folder})


def fetch(
    name: Annotated[str | None, typer.Argument(help="A set's name; --list shows all.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The set's folder. Default: the cache, where --data NAME looks.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show the public sets, their terms and checksums.")] = False,
) -> None:
    """Download a public data set, or check one that is there; what was cut is continued."""
    from medim.data.public.catalog import SETS
    from medim.data.public.fetch import fetch as bring

    if list_:
        for known, about in SETS.items():
            console.print(f"{known}: {about.described()}", markup=False, highlight=False, soft_wrap=True)
        return
    if name is None:
        raise UsageError("expected the name of a public set: medim fetch NAME. `medim fetch --list` shows all.")
    got = bring(name, out, progress=progress("fetched", "MB", 10**6))
    note = SETS[got.record["name"]].note
    rows = {"files": got.files, "licence": got.record["licence"], "cite": got.record["citation"]}
    state = "written to" if got.new else "was there, every file as it was fetched"
    show("fetch", {**rows, **({"note": note} if note else {}), state: got.folder})


def index(
    sources: Annotated[list[Path], typer.Argument(help="Files or folders of images, or fetched sets.")],
    modality: Annotated[Modality, typer.Option(help="Which images count.")],
    out: Out,
    labels: Labels = None,
    subjects: Subjects = None,
    jobs: Annotated[int | None, typer.Option(help="Processes. Default: one a core.", min=1)] = None,
    reread: Annotated[
        bool, typer.Option("--reread", help="Open every file, also those that have not changed since the last time.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """List every image, and every file that is none with the reason; files that have not changed are not opened."""
    from medim.data.index.index import AllRejectedError, build_index
    from medim.data.index.records import write_rejections
    from medim.data.parallel import available
    from medim.data.public.fetch import named
    from medim.files import fresh_folder

    places = [named(source, modality) for source in sources]
    how: Any = {"jobs": jobs or available(), "remember": not reread, "progress": progress("looked at", "files")}
    try:
        found = build_index(places, modality, labels=labels, subjects=subjects, **how)
    except AllRejectedError as error:
        write_rejections(fresh_folder(out, overwrite=overwrite) / "rejected.csv", error.index.rejected)
        raise
    found.write(fresh_folder(out, overwrite=overwrite))
    counts = {
        "images": len(found.records),
        "subjects": len({r.subject for r in found.records}),
        "rejected": len(found.rejected),
        "files opened": found.opened,
    }
    show("index", {**counts, "written to": out})


def preprocess(
    source: Annotated[Path, typer.Argument(help="Images or an index.")],
    modality: Annotated[Modality, typer.Option(help="Which images count.")],
    out: Out,
    config: Config = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
) -> None:
    """Preprocess images into a store that pretrain and finetune read crops from; what is whole is kept."""
    from medim.data.loading.cohort import open_cohort
    from medim.data.loading.quality_table import assess, counts, flagged, write_quality
    from medim.data.source import open_source
    from medim.training.pretrain.run import resolve_config

    if out.exists() and not (out / "store.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out}: expected a store, or an empty or new folder. Choose another --out.")
    resolve_config(config or modality)
    found, _ = open_source(source, modality)
    steps = resolve_config(config or modality, index=found).preprocessing
    cohort = open_cohort(found, found.records, steps, split_seed=0, store=out, jobs=jobs)
    rows = assess(found.records, cohort.figures())
    write_quality(out, rows)
    replace(found, records=flagged(found.records, rows)).write(out)
    rejected = len(found.rejected) + len(cohort.rejected)
    show("preprocess", {"images": len(cohort.keys), "rejected": rejected, **counts(rows), "written to": out})
