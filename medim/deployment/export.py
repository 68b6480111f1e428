"""`medim export`: a finished run becomes a package, or, where a gate fails, nothing at all."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch

import medim
from medim.data.seen import FINGERPRINTS
from medim.deployment import acceptance
from medim.deployment.card import card
from medim.deployment.contract import (
    GOLDEN,
    GRAPH,
    NOT_REPORTED,
    REPORT,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    STATISTICS,
    WEIGHTS,
)
from medim.deployment.draft import Draft, Options, draft
from medim.deployment.finished_run import load_run
from medim.deployment.package import Package, load_package, write_sums
from medim.files import json_bytes, write_bytes
from medim.types import UserError

SCHEMA_VERSION = 1


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
        "medim": medim.__version__,
        "numpy": np.__version__,
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return json_bytes({"schema_version": SCHEMA_VERSION, "gates": made.gates, "versions": versions})


def _card(made: Draft) -> bytes:
    return card(made.contract, made.gates).encode()


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
    "MODEL_CARD.md": _card,
}


def export(
    run: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str = "0.1.0",
    intended_use: str = NOT_REPORTED,
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
        overwrite: replace what lies at `out`.

    Raises:
        UserError: `run` is not finished, `out` is taken, or a gate failed.
    """
    run, out = Path(run), Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise UserError(f"{out}: expected an empty or new folder. Use --overwrite to replace it, or another --out.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        with _one_thread():
            _build(draft(load_run(run), Options(name, version, intended_use)), folder, out)
        folder.chmod(0o755)
        if out.is_dir():
            shutil.rmtree(out)
        folder.replace(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return load_package(out)


def _build(made: Draft, folder: Path, out: Path) -> None:
    made.gates.update(acceptance.of_networks(made), **acceptance.as_they_must_turn_out())
    for name, part in PARTS.items():
        data = part(made)
        if data is not None:
            write_bytes(folder / name, data)
    write_sums(folder)
    results = {**made.gates, **acceptance.of_folder(folder, made, [made.run.folder, out])}
    failed = {name: result for name, result in results.items() if result["verdict"] != "pass"}
    if failed:
        reasons = "; ".join(f"{name}: {result}" for name, result in failed.items())
        raise UserError(f"{made.run.folder}: not exported, because a gate failed. {reasons}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread, so that sums are added in one order and the export does not depend on the machine's load."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
