"""Commands around a package: `export`, `verify`, `predict`, `embed`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from medim.cli.options import (
    InputsArgument,
    KeepNamesOption,
    OutOption,
    OverwriteOption,
    PublicKeyOption,
    ResumeOption,
)
from medim.cli.terminal import format_or_dash, print_result, print_table, print_warning
from medim.cli.tracking import start_tracking, track_export, track_prediction
from medim.console.progress import show_progress
from medim.files import decode_json
from medim.types import UsageError, UserError

MAX_TABLE_ROWS = 10  # predictions and warnings printed by default
MAX_TABLE_COLUMNS = 12  # of a table that is printed by default
HIDDEN_COLUMNS = {"ood", "ood_feature_group", "ood_reason"}  # of the printed table


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Command-line arguments of `medim export`."""

    run: Annotated[Path, typer.Argument(help="A pretraining or fine-tuning run.")]
    out: OutOption
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the package. Default: its modality and kind.")
    ] = None
    version: Annotated[str, typer.Option(metavar="X.Y.Z", help="Version of the package.")] = "0.1.0"
    intended_use: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Intended use, for the contract and the model card.")
    ] = None
    card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML file with the fields of the model card that the run does not record."),
    ] = None
    licence: Annotated[Path | None, typer.Option(metavar="FILE", help="Text file with the licence of the weights.")] = (
        None
    )
    private_key: Annotated[
        Path | None,
        typer.Option("--private-key", metavar="FILE", help="Ed25519 private key (PEM) that signs the package."),
    ] = None
    label_codes: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON file with the codes of the classes, or the shipped one: hippocampus."),
    ] = None
    dicom_rules: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON file with rules for DICOM images. Default: the rules of the modality."),
    ] = None
    register: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Register the package in MLflow as a new version of the model NAME, with the alias candidate.",
        ),
    ] = None
    overwrite: OverwriteOption = False


def export(arguments: ExportArguments) -> None:
    """Export a run as a package.

    It contains weights, ONNX graph, preprocessing and test results.
    """
    from medim.export.builder import ExportOptions
    from medim.export.export import export as run_export
    from medim.package.contract import REPORT
    from medim.package.model_card import CARD_FILE, parse_model_card

    start = start_tracking()
    options = ExportOptions(
        name=arguments.name,
        version=arguments.version,
        intended_use=arguments.intended_use,
        card=arguments.card,
        licence=arguments.licence,
        private_key=arguments.private_key,
        label_codes=arguments.label_codes,
        dicom_rules=arguments.dicom_rules,
        overwrite=arguments.overwrite,
    )
    if arguments.register is not None:
        from medim.tracking.registry import check_registry

        check_registry(arguments.register)
    package = run_export(arguments.run, arguments.out, options)
    n_open = parse_model_card(package.read_file(CARD_FILE)).not_reported
    open_fields = f"{n_open} not reported" + ("" if arguments.card else "; --card FILE answers them")
    print_result(
        "export",
        {
            "kind": package.contract.kind,
            "version": f"{package.contract.name} {package.contract.version}",
            "sha256": package.sha256,
            "gates": _format_gates(cast(Any, decode_json(package.read_file(REPORT), REPORT)["gates"])),
            "fields of the card": open_fields,
            "written to": arguments.out,
        },
    )
    track_export(arguments.run, package, arguments.out, arguments.register, start)


def _format_gates(gates: Mapping[str, Mapping[str, object]]) -> str:
    """Count the gates by verdict, with the reasons of those that were not run."""
    skipped = {name: gate.get("why", "") for name, gate in gates.items() if gate["verdict"] == "not run"}
    n_passed = sum(gate["verdict"] == "pass" for gate in gates.values())
    reasons = f", {len(skipped)} not run ({'; '.join(f'{name}: {why}' for name, why in skipped.items())})"
    return f"{n_passed} of {len(gates)} passed{reasons if skipped else ''}"


def verify(package: Annotated[Path, typer.Argument(help="A package.")], public_key: PublicKeyOption = None) -> None:
    """Verify the signature, hashes and golden inputs of a package."""
    from medim.package.package import verify_package as run_verify

    print_result(
        "verify", {gate.name: f"{gate.verdict} ({gate.detail})" for gate in run_verify(package, public_key=public_key)}
    )


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """Command-line arguments of `medim predict`."""

    package: Annotated[Path, typer.Argument(help="A package.")]
    inputs: InputsArgument
    out: OutOption
    public_key: PublicKeyOption = None
    output_format: Annotated[
        Literal["nifti", "dicom"], typer.Option("--format", help="nifti: NIfTI, PNG and JSON. dicom: DICOM SEG and SR.")
    ] = "nifti"
    labelmap: Annotated[
        bool, typer.Option("--labelmap", help="Write SEG objects of type LABELMAP, which older viewers cannot display.")
    ] = False
    preview: Annotated[
        bool, typer.Option("--preview", help="Write a picture of each image with its prediction to previews/.")
    ] = False
    withhold_unusual: Annotated[
        bool, typer.Option("--withhold-unusual", help="Write no answer for an image that is out of distribution.")
    ] = False
    table: Annotated[
        bool, typer.Option("--table", help="Print all predictions. Default: those of up to ten images.")
    ] = False
    keep_names: KeepNamesOption = False
    resume: ResumeOption = False
    overwrite: OverwriteOption = False


def predict(arguments: PredictArguments) -> None:
    """Apply a package to images and write one answer per image."""
    from medim.package.package import load_package
    from medim.predict.images import ImageSource
    from medim.predict.predict import predict as run

    start, package = start_tracking(), load_package(arguments.package, public_key=arguments.public_key)
    rows = run(
        package,
        ImageSource(arguments.inputs, arguments.keep_names),
        arguments.out,
        output_format=arguments.output_format,
        labelmap=arguments.labelmap,
        preview=arguments.preview,
        withhold_unusual=arguments.withhold_unusual,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        progress=show_progress("predicted"),
    )
    shown = [{name: value for name, value in row.items() if name not in HIDDEN_COLUMNS} for row in rows]
    if arguments.table or (len(rows) <= MAX_TABLE_ROWS and len(shown[0]) <= MAX_TABLE_COLUMNS):
        print_table("predictions", shown)
    _warn_unusual([row for row in rows if row["ood"]])
    print_result("predict", _summarise_predictions(rows, arguments))
    track_prediction(package, arguments.out, arguments.output_format, start)


def _warn_unusual(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a warning for each image that is out of distribution, at most `MAX_TABLE_ROWS`."""
    for row in rows[:MAX_TABLE_ROWS]:
        group = f"{row['ood_feature_group']}, {format_or_dash(row['ood_score'])} times the limit"
        print_warning(f"unusual image {row['image']}: {row['ood_reason']} ({group})")
    if len(rows) > MAX_TABLE_ROWS:
        print_warning(f"{len(rows) - MAX_TABLE_ROWS} more unusual images: column ood of predictions.csv")


def _summarise_predictions(rows: Sequence[Mapping[str, Any]], arguments: PredictArguments) -> dict[str, Any]:
    """Count the usual, unusual and rejected images, and name the written files."""
    from medim.data.index.records import read_rejections
    from medim.output_folder import REJECTIONS_FILE

    out, groups = arguments.out, Counter(str(row["ood_feature_group"]) for row in rows if row["ood"])
    reasons = Counter(rejection.reason for rejection in read_rejections(out / REJECTIONS_FILE))
    counts = {"predicted": len(rows), "UNUSUAL": sum(groups.values()), "rejected": sum(reasons.values())}
    details = {"UNUSUAL": groups, "rejected": reasons}
    summary: dict[str, Any] = {
        name: f"{count}{_format_counts(details.get(name, Counter()))}" for name, count in counts.items()
    }
    if all(row["ood"] is None for row in rows):
        summary["UNUSUAL"] = "not known: this package has no out-of-distribution detector"
    if reasons:
        summary["reasons"] = out / REJECTIONS_FILE
    pictures = {"pictures": out / "previews"} if arguments.preview else {}
    return {**summary, "written to": out / "predictions.csv", **pictures}


def _format_counts(counts: Counter[str]) -> str:
    return f" ({', '.join(f'{name} {n}' for name, n in sorted(counts.items()))})" if counts else ""


def embed(
    encoder: Annotated[Path, typer.Argument(metavar="PACKAGE|RUN", help="Package or run of an encoder.")],
    inputs: InputsArgument,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file: .npz, .csv or .parquet.")],
    mi_map_dir: Annotated[
        Path | None,
        typer.Option(
            "--mi-map-dir", metavar="FOLDER", help="Folder for mutual-information maps (NIfTI or 16-bit PNG)."
        ),
    ] = None,
    public_key: PublicKeyOption = None,
    keep_names: KeepNamesOption = False,
    resume: ResumeOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier --out and the content of --mi-map-dir.")
    ] = False,
) -> None:
    """Extract features, one row per image.

    With --mi-map-dir, mutual-information maps are written too.
    """
    from medim.output_folder import REJECTIONS_FILE
    from medim.package.package import load_package
    from medim.predict.embed import embed_images
    from medim.predict.images import ImageSource

    network: Any
    if (encoder / "medim.json").is_file():
        network = load_package(encoder, public_key=public_key)
    elif public_key is not None:
        if not encoder.exists():
            raise UserError(f"{encoder}: there is no such file or folder. Check the path of the package.")
        raise UsageError(
            "--public-key: expected a package, got a run. Export the run with --private-key, or leave --public-key out."
        )
    else:
        from medim.evaluation.evaluate import open_encoder

        network = open_encoder(encoder)
    images, features = embed_images(
        network,
        ImageSource(inputs, keep_names),
        out,
        maps=mi_map_dir,
        overwrite=overwrite,
        resume=resume,
        progress=show_progress("embedded"),
    )
    rejections_file = out.with_name(f"{out.name}.{REJECTIONS_FILE}")
    rejections = {"rejected": f"see {rejections_file}"} if rejections_file.exists() else {}
    output_rows = {**rejections, "written to": out, **({"maps in": mi_map_dir} if mi_map_dir else {})}
    print_result("embed", {"images": len(images), "features": features.shape[1], **output_rows})
