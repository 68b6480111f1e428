"""The command line: parse, make one call, print what came out. Heavy imports stay inside the commands."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from medim import __version__
from medim.types import Modality, UserError

app = typer.Typer(
    name="medim",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Deep InfoMax pretraining of medical image encoders, from DICOM to a package a hospital can run.",
)
config_app = typer.Typer(no_args_is_help=True, help="The shipped presets.")
app.add_typer(config_app, name="config")
console = Console()

Data = Annotated[
    Path | None, typer.Option("--data", help="Images, an index or a store. Default for MRI: the built-in cohort.")
]
Labels = Annotated[Path | None, typer.Option("--labels", help="CSV with columns image or subject, and label or mask.")]
Subjects = Annotated[Path | None, typer.Option("--subjects", help="CSV with columns image,subject.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a config key: key=value. May be repeated.")]
Seed = Annotated[int, typer.Option("--seed", help="Fixes everything that is drawn.")]
SplitSeed = Annotated[int, typer.Option("--split-seed", help="Seed of the split by subject.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Empty --out first.")]
Accelerator = Annotated[str, typer.Option("--accelerator", help="auto, cpu, cuda, mps.")]
Precision = Annotated[str | None, typer.Option("--precision", help="32-true or bf16-mixed. Default: the config's.")]
Config = Annotated[str | None, typer.Option("--config", help="A preset's name (medim config list) or a YAML file.")]
Inputs = Annotated[list[Path], typer.Argument(help="NIfTI, DICOM files or folders, PNG, npz.")]
Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
Classes = Literal["segmentation", "classification"]


def main() -> None:
    """Entry point of the `medim` script."""
    app()


def command(on: typer.Typer, name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that has `--quiet` and `--debug`, and turns errors into messages and exit codes."""
    quiet = Annotated[bool, typer.Option("--quiet", help="Print results alone.")]
    debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

    def register(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def run(**options: Any) -> None:
            quietly, tracing = options.pop("quiet"), options.pop("debug")
            handler = RichHandler(
                console=Console(stderr=True),
                show_path=False,
                show_level=False,
                log_time_format="%H:%M:%S",
                markup=False,
            )
            logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
            logging.getLogger("medim").setLevel(logging.WARNING if quietly else logging.INFO)
            try:
                body(**options)
            except (UserError, OSError, ImportError, KeyboardInterrupt) as error:
                if tracing:
                    raise
                Console(stderr=True, soft_wrap=True).print(f"medim: {_message(error)}", markup=False, highlight=False)
                raise typer.Exit(getattr(error, "exit_code", 1)) from None

        own = inspect.signature(body, eval_str=True)
        extra = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in (("quiet", quiet), ("debug", debug))
        ]
        run.__signature__ = own.replace(parameters=[*own.parameters.values(), *extra])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
        on.command(name)(run)
        return body

    return register


def _message(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f'this command needs {error.name}, which is not installed. Run: pip install "medim[train]"'
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. What was written is whole; --resume continues."
    return str(error)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"medim {__version__}")
        raise typer.Exit


@command(app)
def doctor() -> None:
    """Say what this machine has, and a remedy for what it lacks."""
    from medim.doctor import checks

    for check in checks():
        mark = "[green]ok[/]" if check.ok else "[yellow]--[/]"
        console.print(
            f"{mark} {check.name}: {check.found}" + (f"  -> {check.remedy}" if check.remedy else ""),
            highlight=False,
            soft_wrap=True,
        )


@command(config_app, "list")
def config_list() -> None:
    """List the shipped presets."""
    from medim.config import presets

    for kind in ("pretrain", "finetune"):
        for name, path in presets(kind).items():
            console.print(
                f"{kind:9} {name:24} {path.read_text().splitlines()[0].lstrip('# ')}", highlight=False, soft_wrap=True
            )


@command(config_app, "show")
def config_show(name: Annotated[str, typer.Argument(help="A preset's name.")]) -> None:
    """Print a preset: its own text, then every default it leaves as it is."""
    from medim.config import show

    typer.echo(show(name))


@command(app)
def example(
    out: Out,
    subjects: Annotated[int, typer.Option(help="Number of subjects.")] = 24,
    spacing: Annotated[float, typer.Option(help="Voxel size in mm.")] = 2.0,
    formats: Annotated[str, typer.Option("--format", help="nifti, dicom, or both with a comma.")] = "nifti",
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the built-in cohort as files: simulated subjects from the MNI152 template."""
    from medim.data.example import make_example
    from medim.files import fresh_folder

    fresh_folder(out, overwrite=overwrite)
    chosen: Any = formats.split(",")
    folder = make_example(
        out, subjects=subjects, spacing=spacing, formats=chosen, seed=seed, progress=_progress("wrote")
    )
    _print("example", {"subjects": subjects, "written to": folder})


@command(app)
def index(
    sources: Annotated[list[Path], typer.Argument(help="Files or folders of images.")],
    modality: Annotated[Modality, typer.Option(help="Which images count.")],
    out: Out,
    labels: Labels = None,
    subjects: Subjects = None,
    overwrite: Overwrite = False,
) -> None:
    """List every image, and every file that is none with the reason."""
    from medim.data.index import build_index
    from medim.files import fresh_folder

    found = build_index(sources, modality, labels=labels, subjects=subjects)
    found.write(fresh_folder(out, overwrite=overwrite))
    counts = {
        "images": len(found.records),
        "subjects": len({r.subject for r in found.records}),
        "rejected": len(found.rejected),
    }
    _print("index", {**counts, "written to": out})


@command(app)
def preprocess(
    source: Annotated[Path, typer.Argument(help="Images or an index.")],
    modality: Annotated[Modality, typer.Option(help="Which images count.")],
    out: Out,
    config: Config = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
) -> None:
    """Preprocess images into a store that pretrain and finetune read crops from; what is whole is kept."""
    from medim.config import load
    from medim.data.source import open_source
    from medim.training.cohort import open_cohort

    steps = load("pretrain", config or modality).preprocessing
    found, _ = open_source(source, modality)
    cohort = open_cohort(found, found.records, steps, split_seed=0, store=out, jobs=jobs)
    found.write(out)
    _print(
        "preprocess",
        {"images": len(cohort.keys), "rejected": len(found.rejected) + len(cohort.rejected), "written to": out},
    )


@command(app)
def pretrain(
    modality: Annotated[Modality, typer.Option(help="Which images count.")],
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<preset>-<hash>.")] = None,
    seed: Seed = 0,
    split_seed: SplitSeed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    accelerator: Accelerator = "auto",
    precision: Precision = None,
    subjects: Subjects = None,
) -> None:
    """Pretrain an encoder on unlabelled images."""
    from medim.config import PretrainConfig, load
    from medim.data.source import open_source
    from medim.training.pretrain import pretrain as run

    settings = load("pretrain", config or modality, [*(set_ or []), *([f"precision={precision}"] if precision else [])])
    assert isinstance(settings, PretrainConfig)
    if settings.modality != modality:
        raise UserError(f"--config {config}: it is for {settings.modality}, and --modality says {modality}.")
    folder = out or Path("runs") / f"{settings.name}-{settings.hash}"
    found, store = open_source(data, modality, subjects=subjects)
    options: dict[str, Any] = {
        "seed": seed,
        "split_seed": split_seed,
        "resume": resume,
        "overwrite": overwrite,
        "accelerator": accelerator,
    }
    summary = run(settings, found, folder, store=store, **options)
    losses = {name: _curve(loss, summary["chance"][name]) for name, loss in summary["loss"].items()}
    shown = {
        "verdict": summary["verdict"],
        **losses,
        "rankme": summary["rankme"],
        "feature std": summary["feature_std"],
    }
    costs = {"seconds a step": summary["seconds_per_step"], "peak memory, MiB": summary["peak_memory_bytes"] / 2**20}
    _print("pretrain", {**shown, **costs, "input shape": summary["input_shape"], "written to": folder})


@command(app)
def finetune(
    task: Annotated[Classes, typer.Option(help="What to learn.")],
    out: Out,
    data: Data = None,
    encoder: Annotated[str, typer.Option(help="A pretraining run or package; none starts fresh.")] = "none",
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="The twin: the encoder's network with fresh weights.")
    ] = False,
    modality: Annotated[Modality | None, typer.Option(help="Needed without an encoder.")] = None,
    labelled: Annotated[int | None, typer.Option(help="Label budget, in images.")] = None,
    label_fraction: Annotated[
        float | None, typer.Option(help="Label budget, as a share of the labelled training images.")
    ] = None,
    labels: Labels = None,
    subjects: Subjects = None,
    config: Config = None,
    set_: Set = None,
    seed: Seed = 0,
    split_seed: SplitSeed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    accelerator: Accelerator = "auto",
) -> None:
    """Fine-tune an encoder on few labels, or train its from-scratch twin."""
    from medim.data.source import open_source
    from medim.training.finetune import finetune as run
    from medim.training.finetune import resolve_config

    origin = None if encoder == "none" else Path(encoder)
    settings = resolve_config(task, modality, origin, config, set_ or [])
    found, store = open_source(data, settings.modality, labels=labels, subjects=subjects)
    options: dict[str, Any] = {
        "seed": seed,
        "split_seed": split_seed,
        "resume": resume,
        "overwrite": overwrite,
        "accelerator": accelerator,
    }
    budget: dict[str, Any] = {"labelled": labelled, "label_fraction": label_fraction}
    summary = run(settings, found, out, encoder=origin, from_scratch=from_scratch, store=store, **budget, **options)
    _print(
        "finetune",
        {
            "labelled images": summary["labelled"],
            "start": summary["init"],
            **_intervals(summary["val"]),
            "written to": out,
        },
    )


@command(app)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A fine-tuning run or a package.")],
    out: Out,
    data: Data = None,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None, typer.Option(help="Default: test where the source has one.")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Keep subjects the model trained on.")] = False,
    labels: Labels = None,
    subjects: Subjects = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model on labelled images, in their own space, with 95 % intervals over subjects."""
    from medim.data.source import open_source
    from medim.evaluation.evaluate import evaluate as run
    from medim.models.saved import find

    found, _ = open_source(data, find(model)[1]["modality"], labels=labels, subjects=subjects)
    options: dict[str, Any] = {"split": split, "include_seen": include_seen, "overwrite": overwrite}
    metrics = run(model, found, out, progress=_progress("measured"), **options)
    _print(
        "evaluate",
        {"cases": metrics["n"], "excluded as seen": metrics["excluded_seen"], **_intervals(metrics), "written to": out},
    )


@command(app)
def export(
    run: Annotated[Path, typer.Argument(help="A pretraining or fine-tuning run.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Make the package that a hospital runs: weights, ONNX, preprocessing, proof."""
    from medim.deployment.export import export as make

    package = make(run, out, overwrite=overwrite)
    _print("export", {"kind": package.contract.kind, "written to": out})


@command(app)
def verify(package: Annotated[Path, typer.Argument(help="A package.")]) -> None:
    """Check every hash and the golden inputs of a package."""
    from medim.deployment.package import verify as check

    _print("verify", {gate.name: f"{gate.verdict} ({gate.detail})" for gate in check(package)})


@command(app)
def embed(
    encoder: Annotated[Path, typer.Argument(metavar="PACKAGE|RUN", help="An encoder's package, or its run.")],
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="FILE.npz, .csv or .parquet.")],
) -> None:
    """Write a row of features an image."""
    from medim.deployment.package import load_package
    from medim.deployment.predict import embed_images

    if (encoder / "medim.json").is_file():
        images, features = embed_images(load_package(encoder), inputs, out, progress=_progress("embedded"))
    else:
        from medim.evaluation.evaluate import open_encoder

        images, features = embed_images(open_encoder(encoder), inputs, out, progress=_progress("embedded"))
    _print("embed", {"images": len(images), "features": features.shape[1], "written to": out})


@command(app)
def predict(
    package: Annotated[Path, typer.Argument(help="A package.")], inputs: Inputs, out: Out, overwrite: Overwrite = False
) -> None:
    """Write a segmentation or a class for each input."""
    from medim.deployment.package import load_package
    from medim.deployment.predict import predict as run

    for row in run(load_package(package), inputs, out, overwrite=overwrite, progress=_progress("predicted")):
        _print(str(row.pop("image")), row)


@command(app)
def report(
    folder: Annotated[Path, typer.Argument(help="A run, an evaluation, an index, or a folder of these.")],
) -> None:
    """Write one self-contained report.html."""
    from medim.evaluation.report import report as write

    _print("report", {"written to": write(folder)})


def _progress(verb: str) -> Callable[[int, int], None]:
    """Log how many images are done, every few seconds."""
    last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 5:
            last = time.monotonic()
            logging.getLogger("medim").info("%s %d of %d images", verb, done, total)

    return say


def _intervals(metrics: Mapping[str, Any]) -> dict[str, str]:
    rows = metrics.get("metrics", metrics)
    return {
        k: f"{_number(v['value'])} [{_number(v['ci_low'])}, {_number(v['ci_high'])}]"
        for k, v in rows.items()
        if isinstance(v, dict)
    }


def _curve(loss: Mapping[str, float | None], chance: float | None) -> str:
    first, last, held_out = (_number(loss[key]) for key in ("first", "last", "held_out"))
    return f"{first} -> {last}, held out {held_out}, chance {_number(chance)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _print(title: str, rows: Mapping[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(name, _number(value) if isinstance(value, float) else str(value))
    console.print(table, soft_wrap=not sys.stdout.isatty(), markup=False, highlight=False)


if __name__ == "__main__":
    main()
