"""Files in `earlier_version/`, written by medim 0.1.0 before its keys and columns were renamed."""

from __future__ import annotations

import html
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medim.data.loading.quality_table import read_quality
from medim.data.loading.splits import read_splits
from medim.data.loading.store import Store
from medim.files import read_json
from medim.migrations import FILE_KEYS, FILE_VALUES, FileKind, read_migrated_json, rename_keys
from medim.model_spec import read_spec
from medim.reports.report import write_report_page
from medim.reports.runs import read_history
from medim.reports.training_curves import plot_health
from medim.study.report.report import write_study_page
from medim.study.results import open_results

OLD = Path(__file__).resolve().parent / "earlier_version"
JSON_FILES: dict[str, FileKind] = {
    "run/summary.json": "run",
    "run/encoder/encoder.json": "model_spec",
    "finetuned/summary.json": "run",
    "evaluated/metrics.json": "run",
    "probed/probe.json": "run",
    "study/summary.json": "study",
    "study/pretraining.json": "pretraining",
    "study/audit.json": "audit",
}
PAGE_TEXTS = {
    "run": ["the latest measured step whose probe", "31 %"],
    "finetuned": ["0 images, 0 subjects", "Labelled images used"],
    "evaluated": ["Subjects excluded (in the training data)", "48 images, 48 subjects"],
}


def leaves(content: Any) -> Iterator[str]:
    """Values of a JSON file, without their keys."""
    if isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from leaves(value)
    else:
        yield json.dumps(content)


def paths(content: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys, with `*` for the items of lists."""
    items = content.items() if isinstance(content, dict) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from paths(value, (*prefix, key))
    for value in content if isinstance(content, list) else ():
        yield from paths(value, (*prefix, "*"))


def matches(path: tuple[str, ...], pattern: str) -> bool:
    parts = pattern.split(".")
    return len(parts) == len(path) and all(part in ("*", key) for part, key in zip(parts, path, strict=True))


@pytest.mark.parametrize(("name", "kind"), JSON_FILES.items())
def test_a_file_of_an_earlier_version_has_the_same_values_under_the_new_keys(name: str, kind: FileKind) -> None:
    old = json.loads((OLD / name).read_text())
    new = read_migrated_json(OLD / name, kind)
    assert not [path for path in paths(new) for pattern in FILE_KEYS[kind] if matches(path, pattern)]
    assert len(list(paths(new))) == len(list(paths(old)))
    replaced = {json.dumps(o): json.dumps(n) for v in FILE_VALUES.get(kind, {}).values() for o, n in v.items()}
    assert Counter(leaves(new)) == Counter(replaced.get(value, value) for value in leaves(old))
    assert new != old
    assert rename_keys(new, kind) == new


def test_every_renamed_key_is_in_a_file_of_the_earlier_version() -> None:
    """No entry of the table is without effect."""
    for kind, renames in FILE_KEYS.items():
        files = [json.loads((OLD / name).read_text()) for name, of in JSON_FILES.items() if of == kind]
        if not files:
            continue
        for pattern, new_key in renames.items():
            *parents, _ = pattern.split(".")
            new_pattern = ".".join([*parents, new_key])
            assert any(matches(p, new_pattern) for file in files for p in paths(rename_keys(file, kind))), pattern


@pytest.mark.parametrize("name", PAGE_TEXTS)
def test_a_report_of_a_run_of_an_earlier_version_is_complete(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / name, tmp_path / name))
    page = write_report_page(folder).read_text()
    assert [text for text in PAGE_TEXTS[name] if text not in page] == []


def test_the_page_of_a_study_of_an_earlier_version_is_complete(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD / "study", tmp_path / "study"))
    page = html.unescape(write_study_page(folder).read_text())
    command = read_json(OLD / "study" / "summary.json")["repeat"]
    texts = ["dim (48), lin (48)", "fixed: it has 4 labelled images, but 10 are needed", command, "raw intensity"]
    assert [text for text in texts if text not in page] == []
    results = open_results(folder)
    assert set(results.arms) == {"scratch", "dim", "lin", "untrained", "pixels"}
    assert results.labelled == {"4": 4, "8": 8}


def test_a_store_of_an_earlier_version_is_read() -> None:
    rows = read_quality(OLD / "store")
    assert [row.metrics.n_unique_values for row in rows] == [58, 57, 60]
    assert rows[0].metrics.background_fraction == 0.171875
    file = next((OLD / "store").glob("*/*.b2nd"))
    metrics = Store(OLD / "store").get_entry(file.stem).metrics
    assert metrics is not None
    assert Store(OLD / "store").is_intact(file.stem)
    assert 0 < metrics.background_fraction < 1 < metrics.n_unique_values


def test_history_splits_and_spec_of_an_earlier_version_are_read() -> None:
    curve = read_history(OLD / "run" / "history.csv", ["local_dim"])[0]
    assert [step for step, _ in curve.val] == [2, 4]
    assert plot_health(OLD / "run" / "history.csv")
    assert Counter(read_splits(OLD / "run" / "split.csv").values()) == {"train": 48, "val": 12, "test": 1}
    assert read_spec(OLD / "run" / "encoder" / "encoder.json").n_selection_labels == 48
