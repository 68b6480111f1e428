"""`medim export`: a finished run becomes a package, or, where a gate fails, nothing at all."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from medim.data.contamination import FINGERPRINTS
from medim.export import gates, monai_bundle
from medim.export.builder import Draft, Options, draft
from medim.export.monai_bundle import CHECKPOINT, INFERENCE, LOGGING, METADATA
from medim.export.run import load_run
from medim.export.sbom import LOCK, SBOM, lock, sbom
from medim.files import json_bytes, write_bytes
from medim.package.contract import (
    GOLDEN,
    GRAPH,
    NOT_REPORTED,
    REPORT,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    STATISTICS,
    WEIGHTS,
)
from medim.package.gate import Gate
from medim.package.integrity import SUMS
from medim.package.model_card import CARD, PAGE, Card, make_card
from medim.package.package import Package, load_package, write_sums
from medim.types import UserError
from medim.version import __version__

SCHEMA_VERSION = 1
NO_LICENCE = b"""\
Who exported this package gave no licence for its weights: ask them before you use it.
medim, which wrote the files around them and runs them, is under the Apache License, Version 2.0.
"""


def _contract(made: Draft) -> bytes:
    return json_bytes(made.contract.model_dump(mode="json"))


def _weights(made: Draft) -> bytes:
    return made.run.weights.read_bytes()


def _graph(file: str) -> Part:
    return lambda made: made.graphs[file].onnx if file in made.graphs else None


def _golden(file: str) -> Part:
    return lambda made: made.goldens[file].dump() if file in made.goldens else None


def _fingerprints(made: Draft) -> bytes | None:
    return made.run.seen.dump() if made.run.seen else None


def _report(made: Draft) -> bytes:
    versions = {
        "medim": __version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return json_bytes({"schema_version": SCHEMA_VERSION, "gates": made.gates, "versions": versions})


def _card(made: Draft) -> Card:
    return make_card(made.contract, made.gates, made.run.summary, licence=made.options.licence is not None)


def _licence(made: Draft) -> bytes:
    given = made.options.licence
    return NO_LICENCE if given is None else given.read_bytes()


Part = Callable[[Draft], bytes | None]
PARTS: dict[str, Part] = {  # file of the package: what makes its bytes, or None where this package has none
    "medim.json": _contract,
    WEIGHTS: _weights,
    GRAPH: _graph(GRAPH),
    GOLDEN: _golden(GOLDEN),
    SCORE_MAP: _graph(SCORE_MAP),
    SCORE_MAP_GOLDEN: _golden(SCORE_MAP_GOLDEN),
    STATISTICS: lambda made: made.run.reference,
    FINGERPRINTS: _fingerprints,
    REPORT: _report,
    CARD: lambda made: json_bytes(_card(made).model_dump(mode="json")),
    PAGE: lambda made: _card(made).page.encode(),
    "LICENSE": _licence,
    LOCK: lambda made: lock(),
    SBOM: lambda made: sbom(made.contract),
    CHECKPOINT: monai_bundle.checkpoint,
    METADATA: monai_bundle.metadata,
    INFERENCE: monai_bundle.inference,
    LOGGING: monai_bundle.logging,
}


def export(
    run: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str = "0.1.0",
    intended_use: str = NOT_REPORTED,
    licence: Path | None = None,
    sign: Path | None = None,
    labels_schema: Path | str | None = None,
    dicom_in: Path | None = None,
    overwrite: bool = False,
) -> Package:
    """Make a package of a run.

    The folder is built beside `out` and renamed, so `out` is whole or absent; exporting twice gives the same bytes.

    Args:
        run: a run with `encoder/` or `model/`.
        out: the package's folder.
        name: of the package; default `<modality>-<kind>`.
        version: semantic version of the package.
        intended_use: a sentence for the contract and the card.
        licence: the text that says what may be done with the weights; without one, the package says so.
        sign: an Ed25519 private key (PEM) to sign SHA256SUMS with.
        labels_schema: codes of the classes, a file or the name of a shipped one; see `medim.package.label_codes`.
        dicom_in: file of rules for DICOM images; default those of the modality. See `medim.package.dicom_rules`.
        overwrite: replace the package that lies at `out`.

    Raises:
        UserError: `run` is not finished, `out` is taken or holds what is no package, `sign` is no private key, or a
            gate failed.
    """
    run, out = Path(run), Path(out)
    held = out.is_dir() and any(out.iterdir())
    if out.is_file() or (held and not overwrite):
        raise UserError(f"{out}: expected an empty or new folder. Use --overwrite to replace it, or another --out.")
    if held and not (out / SUMS).is_file():
        raise UserError(f"{out}: --overwrite replaces only a package, and this is none. Choose another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    options = Options(name, version, intended_use, licence, sign, labels_schema, dicom_in)
    try:
        with _one_thread():
            _build(draft(load_run(run), options), folder, out)
        folder.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return load_package(out)


def _build(made: Draft, folder: Path, out: Path) -> None:
    run = made.run.folder
    expected = gates.as_they_must_turn_out()
    made.gates.update(gates.of_networks(made), **expected)
    _stop_at_failures(run, made.gates)
    _write(made, folder)

    def again(place: Path) -> None:
        _write(replace(draft(load_run(run), made.options), gates=made.gates), place)

    found = gates.of_folder(folder, made, [run, out], again)
    _stop_at_failures(run, found)
    if found != expected:
        raise UserError(f"{run}: not exported: expected {expected} of the finished package, got {found}. Try again.")


def _write(made: Draft, folder: Path) -> None:
    for name, part in PARTS.items():
        data = part(made)
        if data is not None:
            write_bytes(folder / name, data)
    write_sums(folder, key=made.options.sign)


def _stop_at_failures(run: Path, results: dict[str, Gate]) -> None:
    failed = {name: result for name, result in results.items() if result["verdict"] == "fail"}
    if failed:
        reasons = "; ".join(f"{name}: {result}" for name, result in failed.items())
        raise UserError(f"{run}: not exported, because a gate failed. {reasons}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, so that sums are added in one order and the export does not depend on the machine's load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
