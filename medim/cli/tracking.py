"""MLflow runs of the commands `evaluate`, `probe`, `export` and `predict`: settings and results without single images.

The functions are called after the result is complete, and log errors instead of raising them. Options that contain
paths or names of inputs are not sent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medim.types import UserError

if TYPE_CHECKING:
    from medim.model_spec import ModelSpec
    from medim.package.package import Package
    from medim.tracking.lineage import Source
    from medim.tracking.results import TrackedResult


def start_tracking() -> float:
    """Return the time of the start of a command, after a check of the switch that turns tracking off.

    Raises:
        UsageError: the switch has an invalid value.
    """
    from medim.tracking.target import is_tracking_enabled

    is_tracking_enabled()
    return time.time()


def track_evaluation(model: Path, spec: ModelSpec, out: Path, summary: Mapping[str, Any], start: float) -> None:
    """Track `medim evaluate`: metrics with intervals, counts, and the files without images.

    Args:
        model: run or package that was evaluated.
        spec: its spec.
        out: output folder.
        summary: content of `summary.json`.
        start: start of the command, in seconds since the epoch.
    """
    from medim.tracking.results import track_result

    track_result("evaluate", lambda: _build_evaluation_result(model, spec, out, summary, start))


def _build_evaluation_result(
    model: Path, spec: ModelSpec, out: Path, summary: Mapping[str, Any], start: float
) -> TrackedResult:
    from medim.tracking.results import TrackedResult
    from medim.tracking.tracker import flatten_estimates
    from medim.tracking.tracking import name_run
    from medim.version import collect_versions

    names = ("task", "split", "init", "model_sha256", "index_hash", "runtime", "classes", "metric_rule", "bootstrap")
    counts = ("n", "subjects", "rejected", "n_excluded_subjects", "n_selection_labels", "seconds_per_image")
    rows = [{"metric": name, **estimate} for name, estimate in summary["metrics"].items()]
    return TrackedResult(
        command="evaluate",
        folder=out,
        name=name_run(out, f"{summary['task']}-{summary['split']}"),
        start=start,
        parameters={
            **{name: summary[name] for name in names},
            "modality": spec.modality,
            "versions": collect_versions(),
        },
        metrics=_select_numbers(summary, counts),
        model_metrics=flatten_estimates(summary["metrics"]),
        index_hash=summary["index_hash"],
        tables={"metrics_table": rows},
        texts=_draw_metrics(summary["metrics"]),
        files=["metrics.json", "summary.json"],
        sources=list_sources(model, spec),
    )


def track_probe(encoder: Path, spec: ModelSpec, out: Path, content: Mapping[str, Any], start: float) -> None:
    """Track `medim probe`: the mean of each metric over subsets, with its deviation or interval.

    Args:
        encoder: run or package that was probed.
        spec: its spec.
        out: output folder.
        content: content of `probe.json`.
        start: start of the command, in seconds since the epoch.
    """
    from medim.tracking.results import track_result

    track_result("probe", lambda: _build_probe_result(encoder, spec, out, content, start))


def _build_probe_result(
    encoder: Path, spec: ModelSpec, out: Path, content: Mapping[str, Any], start: float
) -> TrackedResult:
    from medim.tracking.results import TrackedResult
    from medim.tracking.tracking import name_run
    from medim.version import collect_versions

    metrics: dict[str, float] = {}
    rows = []
    for row in content["summary"]:
        estimates = {name: value for name, value in row.items() if isinstance(value, Mapping)}
        flat = {
            f"{name}{suffix}": estimate[key]
            for name, estimate in estimates.items()
            for suffix, key in (("", "mean"), ("_sd", "sd"), ("_low", "ci_low"), ("_high", "ci_high"))
        }
        rows.append({**{name: value for name, value in row.items() if name not in estimates}, **flat})
        prefix = f"{row['features']}/{row['budget'].replace('%', ' percent')}/"
        metrics |= {f"{prefix}{name}": value for name, value in flat.items() if value is not None}
    names = ("protocol", "levels", "encoder_sha256", "index_hash", "split_seed", "classes", "split")
    return TrackedResult(
        command="probe",
        folder=out,
        name=name_run(out, f"probe-{content['protocol']}"),
        start=start,
        parameters={
            **{name: content[name] for name in names},
            "seeds": len({row["seed"] for row in content["rows"]}),
            "budgets": list(dict.fromkeys(row["budget"] for row in content["summary"])),
            "modality": spec.modality,
            "versions": collect_versions(),
        },
        metrics=_select_numbers(content, ("n", "subjects", "rejected")),
        model_metrics=metrics,
        index_hash=content["index_hash"],
        tables={"probe_table": rows},
        files=["probe.json"],
        sources=list_sources(encoder, spec),
    )


def track_export(run: Path, package: Package, out: Path, register: str | None, start: float) -> None:
    """Track `medim export`: contract, model card and gates; with `--register` the whole package.

    Args:
        run: run that was exported.
        package: the package.
        out: its folder.
        register: name of the registered model; None for no registration.
        start: start of the command, in seconds since the epoch.

    Raises:
        UserError: the package could not be registered.
    """
    from medim.tracking.results import track_result

    is_sent = track_result("export", lambda: _build_export_result(run, package, out, register, start))
    if register and not is_sent:
        raise UserError(
            f"--register {register}: the package is complete, but not registered (see above). "
            f"To register it later: medim sync {out}"
        )


def _build_export_result(run: Path, package: Package, out: Path, register: str | None, start: float) -> TrackedResult:
    from medim.files import decode_json
    from medim.package.contract import REPORT
    from medim.package.model_card import CARD_FILE, CARD_PAGE, parse_model_card
    from medim.tracking.lineage import make_source
    from medim.tracking.registry import PackageVersion
    from medim.tracking.results import TrackedResult

    contract = package.contract
    described = _describe_contract(package)
    report: Any = decode_json(package.read_file(REPORT), Path(REPORT))
    columns = ("verdict", "measured", "allowed")
    gates = [
        {"gate": name, **{column: _format_cell(gate.get(column)) for column in columns}}
        for name, gate in report["gates"].items()
    ]
    sources = list_sources(run, contract.spec)
    if not contract.spec.is_encoder:
        sources.append(make_source("evaluation", contract.spec.sha256))
    tags = {f"medim.{name}": str(value) for name, value in described.items() if name != "classes"}
    return TrackedResult(
        command="export",
        folder=out,
        name=f"{contract.name}-{contract.version}",
        start=start,
        parameters={**described, "signed": contract.signed_by is not None, "versions": report["versions"]},
        metrics={
            "bytes": sum((out / name).stat().st_size for name in package.sums),
            "gates_passed": sum(gate["verdict"] == "pass" for gate in gates),
            "gates_not_run": sum(gate["verdict"] == "not run" for gate in gates),
            "card_fields_not_reported": parse_model_card(package.read_file(CARD_FILE)).not_reported,
        },
        tables={"gates_table": gates},
        files=["medim.json", CARD_PAGE, REPORT],
        sources=sources,
        package_sha256=package.sha256,
        version=PackageVersion(name=register, tags=tags) if register else None,
    )


def track_prediction(package: Package, out: Path, output_format: str, start: float) -> None:
    """Track `medim predict` by counts, if a tracking target is configured: it must not become slower without one.

    Args:
        package: the package.
        out: output folder.
        output_format: value of `--format`.
        start: start of the command, in seconds since the epoch.
    """
    from medim.tracking.results import is_tracking_configured, track_result

    if is_tracking_configured():
        track_result("predict", lambda: _build_prediction_result(package, out, output_format, start))


def _build_prediction_result(package: Package, out: Path, output_format: str, start: float) -> TrackedResult:
    from collections import Counter

    from medim.data.index.records import read_rejections
    from medim.files import read_json
    from medim.output_folder import REJECTIONS_FILE
    from medim.tracking.results import TrackedResult

    counts = read_json(out / "summary.json")["counts"]
    reasons = Counter(rejection.reason for rejection in read_rejections(out / REJECTIONS_FILE))
    described = _describe_contract(package)
    return TrackedResult(
        command="predict",
        folder=out,
        name=f"{described['name']}-{described['version']}",
        start=start,
        parameters={**described, "format": output_format},
        metrics={**counts, **{f"rejected/{reason}": n for reason, n in reasons.items()}},
        sources=_list_package_sources(package.sha256, package.contract.spec),
    )


def _draw_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Draw the metrics between 0 and 1 with their intervals."""
    from medim.reports.figures import interval_plot
    from medim.reports.page import unit_interval_metrics

    rows = unit_interval_metrics(metrics)
    return {"figures/metrics.svg": str(interval_plot(rows, "Metrics with their intervals").svg)} if rows else {}


def list_sources(path: Path, spec: ModelSpec) -> list[Source]:
    """List the sources of a command that reads weights: package, model and encoder."""
    from medim.files import file_sha256
    from medim.integrity import SUMS
    from medim.tracking.lineage import make_source

    if (path / SUMS).is_file():
        return _list_package_sources(file_sha256(path / SUMS), spec)
    return [make_source("encoder" if spec.is_encoder else "model", spec.sha256, path), *_list_parents(spec)]


def _list_package_sources(sha256: str, spec: ModelSpec) -> list[Source]:
    from medim.tracking.lineage import make_source

    weights = make_source("encoder" if spec.is_encoder else "model", spec.sha256)
    return [make_source("package", sha256), weights, *_list_parents(spec)]


def _list_parents(spec: ModelSpec) -> list[Source]:
    """List the encoder that a model started from."""
    from medim.tracking.lineage import make_source

    parent = spec.provenance.parent
    return [] if spec.is_encoder or not parent else [make_source("encoder", parent)]


def _describe_contract(package: Package) -> dict[str, object]:
    contract = package.contract
    names = ("name", "version", "kind", "modality")
    return {**{name: getattr(contract, name) for name in names}, "package_sha256": package.sha256} | {
        "classes": list(contract.classes)
    }


def _select_numbers(content: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    return {name: float(content[name]) for name in names if content.get(name) is not None}


def _format_cell(value: object) -> object:
    return value if value is None or isinstance(value, int | float | str) else str(value)
