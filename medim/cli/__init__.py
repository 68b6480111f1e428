"""The command line: parse, make one call, print what came out. Heavy imports stay inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from medim.cli.data import example, fetch, index, preprocess
from medim.cli.evaluation import study
from medim.cli.options import (
    AcceleratorOption,
    ConfigOption,
    DataOption,
    DevicesOption,
    InputsArgument,
    LabelsOption,
    NodesOption,
    OutOption,
    OverwriteOption,
    PrecisionOption,
    ResumeOption,
    SeedOption,
    SetOption,
    SplitSeedOption,
    StrictOption,
    SubjectsOption,
    TrustOption,
)
from medim.cli.terminal import (
    console,
    format_averages,
    format_intervals,
    format_loss,
    format_or_dash,
    print_result,
    register_command,
    show_progress,
)
from medim.cli.training import plan
from medim.signals import handle_shutdown_signals
from medim.types import Modality, UsageError, UserError
from medim.version import __version__

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


def main() -> None:
    """Entry point of the `medim` script."""
    app()


@app.callback(invoke_without_command=True)
def _print_version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"medim {__version__}")
        raise typer.Exit


@register_command(app)
def doctor() -> None:
    """Say what this machine has, and a remedy for what it lacks."""
    from medim.doctor import run_checks

    for check in run_checks():
        mark = "[green]ok[/]" if check.ok else "[yellow]--[/]"
        console.print(
            f"{mark} {check.name}: {check.status}" + (f"  -> {check.remedy}" if check.remedy else ""),
            highlight=False,
            soft_wrap=True,
        )


@register_command(config_app, "list")
def config_list() -> None:
    """List the shipped presets."""
    from medim.config import list_presets

    rows = [(kind, name, path) for kind in ("pretrain", "finetune") for name, path in list_presets(kind).items()]
    width = max(len(name) for _, name, _ in rows)
    for kind, name, path in rows:
        title = path.read_text().splitlines()[0].lstrip("# ")
        console.print(f"{kind:9} {name:{width}} {title}", highlight=False, soft_wrap=True)


@register_command(config_app, "show")
def config_show(name: Annotated[str, typer.Argument(help="A preset's name.")]) -> None:
    """Print a preset: every value under its meaning."""
    from medim.cli.presets import render_preset

    typer.echo(render_preset(name))


for body in (example, fetch, index, preprocess, plan):
    register_command(app)(body)


@register_command(app)
@handle_shutdown_signals()
def pretrain(
    modality: Annotated[Modality, typer.Option(help="Which images count.")],
    data: DataOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/<preset>-<hash>.")] = None,
    seed: SeedOption = 0,
    split_seed: SplitSeedOption = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    accelerator: AcceleratorOption = "auto",
    devices: DevicesOption = None,
    nodes: NodesOption = None,
    precision: PrecisionOption = None,
    stop_on_collapse: Annotated[
        bool, typer.Option("--stop-on-collapse", help="End a run that has diverged or collapsed.")
    ] = False,
    subjects: SubjectsOption = None,
) -> None:
    """Pretrain an encoder on unlabelled images."""
    from medim.data.source import open_source
    from medim.training.auto_config import describe_input
    from medim.training.engine.launch import is_main_process
    from medim.training.pretrain.run import pretrain as run
    from medim.training.pretrain.run import resolve_pretrain_config

    config_args = config or modality, [*(set_ or []), *([f"precision={precision}"] if precision else [])]
    settings = resolve_pretrain_config(*config_args)  # a mistake in it shows before images are read
    if settings.modality != modality:
        raise UserError(f"--config {config}: it is for {settings.modality}, and --modality says {modality}.")
    image_index, store = open_source(data, modality, subjects=subjects)
    settings = resolve_pretrain_config(*config_args, index=image_index)
    folder = out or Path("runs") / f"{settings.name}-{settings.hash}"
    options: dict[str, Any] = {
        "seed": seed,
        "split_seed": split_seed,
        "resume": resume,
        "overwrite": overwrite,
        "accelerator": accelerator,
        "devices": devices,
        "nodes": nodes,
        "stop_on_collapse": stop_on_collapse,
    }
    summary = run(settings, image_index, folder, store=store, **options)
    if not is_main_process():
        return
    diagnostics = summary["diagnostics"]
    losses = {name: format_loss(loss, summary["chance"][name]) for name, loss in summary["loss"].items()}
    diagnostic_lines = {
        name: f"{format_or_dash(v['last'])}, held out {format_or_dash(v['held_out'])}"
        for name, v in diagnostics.items()
    }
    result_rows = {
        "verdict": summary["verdict"],
        **losses,
        **diagnostic_lines,
        "rankme": summary["rankme"],
        "feature std": summary["feature_std"],
    }
    costs = {"seconds a step": summary["seconds_per_step"], "peak memory, MiB": summary["peak_memory_bytes"] / 2**20}
    print_result("pretrain", {**result_rows, **costs, **describe_input(settings, image_index), "written to": folder})


@register_command(app)
def probe(
    encoder: Annotated[Path, typer.Argument(help="A pretraining run, or its package.")],
    data: DataOption = None,
    protocol: Annotated[Literal["linear", "knn"], typer.Option(help="Logistic regression, or neighbours.")] = "linear",
    label_fraction: Annotated[
        list[float] | None,
        typer.Option(help="Label budget, as a share of the labelled training images. May be repeated. Default: 1.0."),
    ] = None,
    labelled: Annotated[list[int] | None, typer.Option(help="Label budget, in images. May be repeated.")] = None,
    seeds: Annotated[int, typer.Option(help="Label subsets a budget, drawn with seeds 0 to N - 1.", min=1)] = 1,
    map_: Annotated[
        list[int] | None,
        typer.Option("--map", help="A map, 0 the finest, whose mean and maximum join the summary. Default: all."),
    ] = None,
    anchors: Annotated[
        bool, typer.Option("--anchors/--no-anchors", help="Measure the untrained encoder and the pixels too.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: <RUN>-probe-<protocol>.")] = None,
    labels: LabelsOption = None,
    subjects: SubjectsOption = None,
    split_seed: SplitSeedOption = 0,
    strict: StrictOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure a frozen encoder: a simple classifier on its features, with few labels."""
    from medim.data.contamination import describe_counts
    from medim.data.source import open_source
    from medim.evaluation.probing.label_budget import Budget
    from medim.evaluation.probing.probe import probe as run
    from medim.models.serialization import locate_weights

    budgets = [Budget(fraction=f) for f in label_fraction or ([] if labelled else [1.0])]
    budgets += [Budget(labelled=n) for n in labelled or []]
    image_index, store = open_source(data, locate_weights(encoder)[1]["modality"], labels=labels, subjects=subjects)
    folder = out or encoder.with_name(f"{encoder.resolve().name}-probe-{protocol}")
    options: dict[str, Any] = {
        "split_seed": split_seed,
        "anchors": anchors,
        "overwrite": overwrite,
        "store": store,
        "strict": strict,
    }
    result = run(
        encoder, image_index, folder, protocol=protocol, budgets=budgets, seeds=range(seeds), maps=map_, **options
    )
    counts = {"validation images": result["n"], **describe_counts(result["seen"])}
    print_result("probe", {**format_averages(result["summary"]), **counts, "written to": folder})


@register_command(app)
@handle_shutdown_signals()
def finetune(
    task: Annotated[Literal["segmentation", "classification"], typer.Option(help="What to learn.")],
    out: OutOption,
    data: DataOption = None,
    encoder: Annotated[str, typer.Option(help="A pretraining run or package; none starts fresh.")] = "none",
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="The twin: the encoder's network with fresh weights.")
    ] = False,
    modality: Annotated[Modality | None, typer.Option(help="Needed without an encoder.")] = None,
    labelled: Annotated[int | None, typer.Option(help="Label budget, in images.")] = None,
    label_fraction: Annotated[
        float | None, typer.Option(help="Label budget, as a share of the labelled training images.")
    ] = None,
    labels: LabelsOption = None,
    subjects: SubjectsOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    seed: SeedOption = 0,
    split_seed: SplitSeedOption = 0,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    strict: StrictOption = False,
    accelerator: AcceleratorOption = "auto",
) -> None:
    """Fine-tune an encoder on few labels, or train its from-scratch twin."""
    from medim.data.contamination import describe_counts as describe_contamination
    from medim.data.source import open_source
    from medim.training.auto_config import describe_input
    from medim.training.finetune.run import finetune as run
    from medim.training.finetune.run import resolve_finetune_config

    encoder_path = None if encoder == "none" else Path(encoder)
    if from_scratch and encoder_path is None:
        raise UsageError(
            "--from-scratch: expected --encoder RUN, whose network the twin has. Leave it out to start fresh."
        )
    config_args = task, modality, encoder_path, config, set_ or []
    settings = resolve_finetune_config(*config_args)  # a mistake in it shows before images are read
    image_index, store = open_source(data, settings.modality, labels=labels, subjects=subjects)
    settings = resolve_finetune_config(*config_args, index=image_index)
    options: dict[str, Any] = {
        "seed": seed,
        "split_seed": split_seed,
        "resume": resume,
        "overwrite": overwrite,
        "strict": strict,
        "accelerator": accelerator,
    }
    budget: dict[str, Any] = {"labelled": labelled, "label_fraction": label_fraction}
    summary = run(
        settings, image_index, out, encoder=encoder_path, from_scratch=from_scratch, store=store, **budget, **options
    )
    print_result(
        "finetune",
        {
            "labelled images": summary["labelled"],
            "start": summary["init"],
            **({} if summary["init"] == "scratch" else describe_contamination(summary["seen"])),
            **describe_input(settings, image_index),
            **format_intervals(summary["val"] or {}),
            "written to": out,
        },
    )


@register_command(app)
def evaluate(
    model: Annotated[Path, typer.Argument(help="A fine-tuning run or a package.")],
    out: OutOption,
    data: DataOption = None,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None, typer.Option(help="Default: test where the source has one.")
    ] = None,
    include_seen: Annotated[bool, typer.Option("--include-seen", help="Keep what the model was trained on.")] = False,
    strict: StrictOption = False,
    labels: LabelsOption = None,
    subjects: SubjectsOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Measure a model on labelled images, in their own space, with 95 % intervals over subjects."""
    from medim.data.contamination import describe_counts
    from medim.data.source import open_source
    from medim.evaluation.evaluate import evaluate as run
    from medim.models.serialization import locate_weights

    image_index, _ = open_source(data, locate_weights(model)[1]["modality"], labels=labels, subjects=subjects)
    options: dict[str, Any] = {"split": split, "include_seen": include_seen, "strict": strict, "overwrite": overwrite}
    metrics = run(model, image_index, out, progress=show_progress("measured"), **options)
    counts = {"cases": metrics["n"], "excluded as seen": metrics["excluded_seen"], **describe_counts(metrics["seen"])}
    print_result("evaluate", {**counts, **format_intervals(metrics), "written to": out})


register_command(app)(study)


@register_command(app)
def export(
    run: Annotated[Path, typer.Argument(help="A pretraining or fine-tuning run.")],
    out: OutOption,
    sign: Annotated[Path | None, typer.Option("--sign", help="Ed25519 private key (PEM) to sign it with.")] = None,
    labels_schema: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON of codes for the classes, or a shipped one: hippocampus."),
    ] = None,
    dicom_in: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON of rules for DICOM images. Default: the modality's.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Make the package that a hospital runs: weights, ONNX, preprocessing, proof."""
    from medim.export.export import export as run_export

    options: dict[str, Any] = {"labels_schema": labels_schema, "dicom_in": dicom_in, "sign": sign}
    package = run_export(run, out, overwrite=overwrite, **options)
    print_result("export", {"kind": package.contract.kind, "written to": out})


@register_command(app)
def verify(package: Annotated[Path, typer.Argument(help="A package.")], trust: TrustOption = None) -> None:
    """Check the signature, every hash and the golden inputs of a package."""
    from medim.package.package import verify_package as run_verify

    print_result("verify", {gate.name: f"{gate.verdict} ({gate.detail})" for gate in run_verify(package, trust=trust)})


@register_command(app)
def embed(
    encoder: Annotated[Path, typer.Argument(metavar="PACKAGE|RUN", help="An encoder's package, or its run.")],
    inputs: InputsArgument,
    out: Annotated[Path, typer.Option(help="FILE.npz, .csv or .parquet.")],
    map_: Annotated[
        Path | None, typer.Option("--map", help="Folder for mutual-information maps, NIfTI or 16-bit PNG.")
    ] = None,
    trust: TrustOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty the folder of --map first.")] = False,
) -> None:
    """Write a row of features an image, and where the image agrees with its own summary."""
    from medim.package.package import load_package
    from medim.predict.predict import embed_images

    network: Any
    if (encoder / "medim.json").is_file():
        network = load_package(encoder, trust=trust)
    elif trust is not None:
        raise UsageError(
            "--trust: only a package can be signed, and this is a run. Export it with --sign, or leave --trust out."
        )
    else:
        from medim.evaluation.evaluate import open_encoder

        network = open_encoder(encoder)
    options: dict[str, Any] = {"maps": map_, "overwrite": overwrite, "progress": show_progress("embedded")}
    images, features = embed_images(network, inputs, out, **options)
    output_rows = {"written to": out, **({"maps in": map_} if map_ else {})}
    print_result("embed", {"images": len(images), "features": features.shape[1], **output_rows})


@register_command(app)
def predict(
    package: Annotated[Path, typer.Argument(help="A package.")],
    inputs: InputsArgument,
    out: OutOption,
    trust: TrustOption = None,
    as_: Annotated[
        Literal["nifti", "dicom"], typer.Option("--as", help="NIfTI, PNG and JSON; or DICOM SEG and SR.")
    ] = "nifti",
    labelmap: Annotated[bool, typer.Option("--labelmap", help="SEG as LABELMAP, which older viewers lack.")] = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Write a segmentation or a class for each input."""
    from medim.package.package import load_package
    from medim.predict.predict import predict as run

    options: dict[str, Any] = {"as_": as_, "labelmap": labelmap, "overwrite": overwrite}
    for row in run(load_package(package, trust=trust), inputs, out, progress=show_progress("predicted"), **options):
        print_result(str(row.pop("image")), row)


@register_command(app)
def report(
    folder: Annotated[
        Path, typer.Argument(help="A run, an evaluation, an index, a store, a study, or a folder of runs.")
    ],
) -> None:
    """Write one self-contained report.html."""
    from medim.reports.report import write_report_page as report_runs
    from medim.study.report.report import is_study
    from medim.study.report.report import write_study_page as report_study

    write_page = report_study if is_study(folder) else report_runs
    print_result("report", {"written to": write_page(folder)})
