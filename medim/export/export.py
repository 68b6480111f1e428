"""Command `medim export`: write a package from a finished run if all gates pass."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from medim.data.contamination import FINGERPRINTS_FILE
from medim.export import gates, monai_bundle
from medim.export.builder import ExportOptions, PackageBuilder, create_builder
from medim.export.monai_bundle import CHECKPOINT, INFERENCE, LOGGING, METADATA
from medim.export.run import load_finished_run
from medim.export.sbom import LOCK, SBOM, build_sbom, lock_file
from medim.files import encode_json, write_bytes
from medim.integrity import SIGNATURE, SUMS
from medim.output_folder import SYSTEM_FILES, acquire_lock
from medim.package.contract import (
    GOLDEN,
    GRAPH,
    REPORT,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    STATISTICS,
    WEIGHTS,
)
from medim.package.gate import GateResult
from medim.package.model_card import CARD_FILE, CARD_PAGE
from medim.package.package import Package, load_package, write_sums
from medim.parsing import read_text
from medim.types import UserError
from medim.version import __version__

SCHEMA_VERSION = 1
MAX_LICENCE_BYTES = 2**20
NO_LICENCE = b"""\
The exporter of this package specified no licence for its weights: request permission before you use them.
The software medim is licensed under the Apache License, Version 2.0.
"""


def _dump_contract(builder: PackageBuilder) -> bytes:
    return encode_json(builder.contract.model_dump(mode="json"))


def _read_weights(builder: PackageBuilder) -> bytes:
    return builder.run.weights.read_bytes()


def _select_graph(file: str) -> PartBuilder:
    return lambda builder: builder.graphs[file].onnx if file in builder.graphs else None


def _select_golden(file: str) -> PartBuilder:
    return lambda builder: builder.goldens[file].dump() if file in builder.goldens else None


def _dump_fingerprints(builder: PackageBuilder) -> bytes | None:
    return builder.run.training_history.dump() if builder.run.training_history else None


def _dump_gate_report(builder: PackageBuilder) -> bytes:
    versions = {
        "medim": __version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return encode_json({"schema_version": SCHEMA_VERSION, "gates": builder.gates, "versions": versions})


def _read_licence_file(builder: PackageBuilder) -> bytes:
    licence_file = builder.options.licence
    if licence_file is None:
        return NO_LICENCE
    try:
        return read_text(licence_file, MAX_LICENCE_BYTES).encode()
    except OSError as error:
        raise UserError(f"{licence_file}: cannot be read ({error.strerror}). Check the path.") from error


PartBuilder = Callable[[PackageBuilder], bytes | None]
PACKAGE_PARTS: dict[
    str, PartBuilder
] = {  # file of the package: function that builds its bytes, or returns None if the package does not contain it
    "medim.json": _dump_contract,
    WEIGHTS: _read_weights,
    GRAPH: _select_graph(GRAPH),
    GOLDEN: _select_golden(GOLDEN),
    SCORE_MAP: _select_graph(SCORE_MAP),
    SCORE_MAP_GOLDEN: _select_golden(SCORE_MAP_GOLDEN),
    STATISTICS: lambda builder: builder.run.ood_statistics,
    FINGERPRINTS_FILE: _dump_fingerprints,
    REPORT: _dump_gate_report,
    CARD_FILE: lambda builder: encode_json(builder.build_card().model_dump(mode="json")),
    CARD_PAGE: lambda builder: builder.build_card().markdown.encode(),
    "LICENSE": _read_licence_file,
    LOCK: lambda builder: lock_file(),
    SBOM: lambda builder: build_sbom(builder.contract),
    CHECKPOINT: monai_bundle.build_checkpoint,
    METADATA: monai_bundle.build_metadata,
    INFERENCE: monai_bundle.build_inference_config,
    LOGGING: monai_bundle.build_logging_config,
}


def export(run: Path, out: Path, options: ExportOptions | None = None) -> Package:
    """Export a run as a package.

    The package is built in a folder beside `out` and renamed to `out`, so that `out` is complete or absent, and an
    earlier package is replaced by a complete one. Exports are reproducible: the same run gives the same bytes.

    Args:
        run: run with a folder `encoder/` or `model/`.
        out: folder of the package.
        options: options of the export.

    Raises:
        UserError: `run` is not finished, `out` is not empty or not a package, `private_key` is not a private key, or a
            gate failed.
    """
    options = options or ExportOptions()
    run, out = Path(run), Path(out)
    with _open_package_folder(out.resolve(), overwrite=options.overwrite) as folder, _use_one_thread():
        builder = create_builder(load_finished_run(run), options)
        _read_licence_file(builder)  # a wrong path shows before the graphs are exported
        _build_package(builder, folder, out)
    return load_package(out)


@contextmanager
def _open_package_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Lock the folder of a package, and provide a folder beside it, which takes its place at the end.

    A package must not contain other files, so `medim.output_folder.output_folder` does not apply. After a kill between
    the two renamings at the end, the next export restores the earlier package first.

    Raises:
        UserError: `out` contains something besides a package, or a package and `overwrite` is not set; another export
            writes there; or the folder cannot be written.
    """
    new, old, lock = (out.with_name(f".{out.name}.medim-{name}") for name in ("new", "old", "lock"))
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(acquire_lock(lock, wait=False))
            except BlockingIOError:
                raise
            except OSError as error:
                raise UserError(f"{out}: cannot be written ({error.strerror}). Choose another --out.") from error
            try:
                if old.is_dir() and not out.exists():
                    old.rename(out)
                _check_package_folder(out, overwrite=overwrite)
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                yield new
                if out.is_dir():
                    out.rename(old)
                new.rename(out)
            finally:
                for folder in (new, old):
                    if out.is_dir() or folder == new:
                        shutil.rmtree(folder, ignore_errors=True)
                lock.unlink()
    except BlockingIOError:
        raise UserError(f"{out}: another export is writing there. Wait for it, or choose another --out.") from None


def _check_package_folder(out: Path, *, overwrite: bool) -> None:
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if not path.is_dir()] if out.is_dir() else []
    if (out.exists() and not out.is_dir()) or (files and not overwrite):
        raise UserError(f"{out}: expected an empty or new folder. Use --overwrite to replace it, or another --out.")
    if not files:
        return
    if SUMS not in files:
        raise UserError(f"{out}: --overwrite replaces only a package. Choose another --out.")
    listed = {line.split(maxsplit=1)[-1].strip() for line in (out / SUMS).read_text(errors="replace").splitlines()}
    foreign = sorted(set(files) - listed - {SUMS, SIGNATURE} - SYSTEM_FILES)
    if foreign:
        raise UserError(
            f"{out}: --overwrite would delete {foreign[0]}, which is no part of the package. Move it to another folder."
        )


def _build_package(builder: PackageBuilder, folder: Path, out: Path) -> None:
    run = builder.run.folder
    expected = gates.expected_folder_gates()
    builder.gates.update(gates.run_network_gates(builder), **expected)
    _stop_at_failures(run, builder.gates)
    _write_package(builder, folder)

    def export_again(second_folder: Path) -> None:
        _write_package(
            replace(create_builder(load_finished_run(run), builder.options), gates=builder.gates), second_folder
        )

    results = gates.run_folder_gates(folder, builder, [run, out], export_again)
    _stop_at_failures(run, results)
    if results != expected:
        raise UserError(f"{run}: not exported: expected the gate results {expected}, got {results}. Try again.")


def _write_package(builder: PackageBuilder, folder: Path) -> None:
    for name, part in PACKAGE_PARTS.items():
        data = part(builder)
        if data is not None:
            write_bytes(folder / name, data)
    write_sums(folder, key=builder.options.private_key)


def _stop_at_failures(run: Path, results: dict[str, GateResult]) -> None:
    failures = {name: result for name, result in results.items() if result["verdict"] == "fail"}
    if failures:
        reasons = "; ".join(f"{name}: {result}" for name, result in failures.items())
        raise UserError(f"{run}: not exported because a gate failed. {reasons}")


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Use one thread, so that the order of summation, and therefore the export, is deterministic."""
    thread_count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(thread_count)
