"""Records of one MLflow run: parameters, metrics, tags, tables, files and the runs that it started from."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medim.tracking.lineage import Source
from medim.tracking.outbox import Outbox, OutboxRecord

MAX_PARAMETER_LENGTH = 6000  # characters of a parameter that every server accepts
_INVALID_CHARACTERS = re.compile(r"[^\w.\- /]|(?<=/)/|^/|/$|(?<=/)\.+(?=/|$)|^\.+(?=/|$)")


class Tracker:
    """Records of a run, written to its outbox.

    Args:
        outbox: outbox of the run; None if tracking is off, so that records are dropped.
    """

    def __init__(self, outbox: Outbox | None) -> None:
        self._outbox = outbox

    @property
    def run_id(self) -> str:
        """Run id of MLflow; empty until MLflow has created the run."""
        return str(self._outbox.state.get("run", "")) if self._outbox else ""

    def add(self, record: OutboxRecord) -> None:
        """Add a record of any kind; see `medim.tracking.delivery.send`."""
        if self._outbox:
            self._outbox.add(record)

    def log_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Log a nested mapping as flat parameters with keys joined by a slash."""
        flat = {clean_name(key): str(value)[:MAX_PARAMETER_LENGTH] for key, value in _flatten_parameters(parameters)}
        self.add({"params": flat})

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the numbers of a step; steps that a resumed run repeats are left out."""
        last, record_step = self._outbox.last if self._outbox else {}, step or 0
        numbers = {clean_name(name): float(value) for name, value in metrics.items()}
        new_metrics = {name: v for name, v in numbers.items() if step is None or record_step > last.get(name, -1)}
        if new_metrics:
            self.add({"metrics": new_metrics, "step": record_step, "time": int(time.time() * 1000)})

    def log_model_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log final numbers of the run, which are also those of the models that it used; see `log_sources`."""
        numbers = {clean_name(name): float(value) for name, value in metrics.items()}
        self.add({"metrics": numbers, "step": 0, "time": int(time.time() * 1000), "on_models": True})

    def log_dataset(self, index_hash: str, context: str) -> None:
        """Log the index of the images by its hash.

        Args:
            index_hash: hash of the index.
            context: use of the images: `training` or `evaluation`.
        """
        self.add({"dataset": index_hash, "context": context})

    def log_table(self, name: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Log rows with the same keys as the table `<name>.json`, which MLflow displays as a table."""
        columns = list(rows[0]) if rows else []
        table = {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}
        self.add({"table": f"{name}.json", "content": table})

    def log_files(self, files: Sequence[Path]) -> None:
        """Log files of the run's folder as artifacts; those of its folder `figures` are stored under that name."""
        for file in files:
            target = file.parent.name if file.parent.name == "figures" else ""
            self.add({"artifact": f"{target}/{file.name}".lstrip("/"), "to": target})

    def log_text(self, name: str, content: str) -> None:
        """Log a text, such as a drawing in SVG, as an artifact."""
        self.add({"text": name, "content": content})

    def log_sources(self, sources: Sequence[Source]) -> None:
        """Link the runs that made the weights of this run; the server looks them up when the record arrives."""
        if sources:
            self.add({"sources": list(sources)})

    def log_weights(self, step: str, sha256: str) -> None:
        """Log the weights that this run made, so that later runs find it.

        Args:
            step: `encoder` or `model`.
            sha256: digest of the weights.
        """
        self.add({"weights": step, "sha256": sha256})

    def measure(self, system_metrics: Mapping[str, float]) -> OutboxRecord:
        """Build the record of a measurement of the machine, at the step after the last one."""
        last = self._outbox.last if self._outbox else {}
        record_step = 1 + max(last.get(name, -1) for name in system_metrics)
        return {"metrics": dict(system_metrics), "step": record_step, "time": int(time.time() * 1000)}


def clean_name(name: str) -> str:
    """Replace the characters of a metric or parameter name that MLflow rejects.

    A changed name ends in a digest of the original, so that two classes do not share a metric.

    Examples:
        >>> clean_name("dice_lesion")
        'dice_lesion'
        >>> clean_name("dice_T1+C")
        'dice_T1_C-41bc5a'
    """
    cleaned = _INVALID_CHARACTERS.sub("_", name)
    return cleaned if cleaned == name else f"{cleaned}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def flatten_estimates(estimates: Mapping[str, Mapping[str, Any]], prefix: str = "") -> dict[str, float]:
    """Flatten metrics with intervals to `<prefix><name>`, `<prefix><name>_low`, `..._high` and `..._missed`.

    Args:
        estimates: by name: `value`, and optionally `ci_low`, `ci_high` and `missed`; None if it is not defined, and
            left out.
        prefix: beginning of all names.

    Examples:
        >>> flatten_estimates({"dice": {"value": 0.8, "ci_low": 0.7, "ci_high": None}}, "val/")
        {'val/dice': 0.8, 'val/dice_low': 0.7}
        >>> flatten_estimates({"hd95_tumour": {"value": 12.5, "missed": 3}})
        {'hd95_tumour': 12.5, 'hd95_tumour_missed': 3}
    """
    suffixes = (("", "value"), ("_low", "ci_low"), ("_high", "ci_high"), ("_missed", "missed"))
    return {
        f"{prefix}{name}{suffix}": number
        for name, estimate in estimates.items()
        for suffix, key in suffixes
        if (number := estimate.get(key)) is not None
    }


def _flatten_parameters(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten_parameters(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
