"""YAML, JSON and CSV of unknown origin: each attack ends with one message in less than a second."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medim.config import load_config, read_config
from medim.data.index.tables import TableFile, read_table
from medim.files import read_json, write_csv
from medim.parsing import (
    MAX_DEPTH,
    MAX_YAML_NODES,
    escape_formula,
    find_extreme_number,
    parse_json,
    parse_yaml,
    read_csv,
    unescape_formula,
)
from medim.types import UsageError, UserError

LEVELS = "abcdefghi"
ALIAS_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{above}'] * 9)}]\n" for above, name in itertools.pairwise(LEVELS)
)
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''@x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIAS_BOMB, f"at most {MAX_YAML_NODES:,} values"),
        ("x: &x {name: *x}", r"the alias \*x is inside its own anchor"),
        ("[" * 5000 + "]" * 5000, f"at most {MAX_DEPTH} nested"),
        ("\n".join(f"k{n}: 1" for n in range(50_000)), f"at most {MAX_YAML_NODES:,} values"),
        ("name: " + "x" * 20_000_000, "at most 1,048,576 characters"),
        ("lr: 1.0\nlr: 2.0", "the key 'lr' occurs twice, again in line 2"),
        ("views: {count: 1, 'count': 2}", "the key 'count' occurs twice"),
        ("!!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("day: 2020-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "limit"),
        ("{[1, 2]: 3}: 4", "unhashable"),
        ("a: [1", "expected"),
    ],
    ids=[
        "aliases",
        "recursive",
        "deep",
        "many",
        "long",
        "twice",
        "twice inline",
        "tag",
        "date",
        "digits",
        "key",
        "cut",
    ],
)
def test_yaml_that_is_hostile_or_ambiguous_is_refused_in_a_second(text: str, message: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"run\.yaml: expected"):
        read_config("pretrain", str(path))
    assert time.process_time() - start < 2


def test_yaml_with_anchors_and_merged_mappings_is_read() -> None:
    text = "base: &b {lr: 1.0, steps: 2}\nmine: {<<: *b, lr: 2.0}\nlist: [*b, *b]"
    assert parse_yaml(text)["mine"] == {"lr": 2.0, "steps": 2}
    assert parse_yaml("1: {<<: [{a: 1}, {a: 2}], a: 3}") == {1: {"a": 3}}


def test_a_configuration_has_names_as_keys_and_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("{1: 2, null: 3}")
    with pytest.raises(UsageError, match="expected names as keys, got 1"):
        read_config("pretrain", str(path))
    for number in range(60):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {tmp_path / str(number + 1)}.yaml\n")
    with pytest.raises(UsageError, match="at most 20 files that extend each other"):
        read_config("pretrain", str(tmp_path / "0.yaml"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, f"at most {MAX_DEPTH} nested"),
        (b'{"dice": NaN}', "expected a finite number, got NaN"),
        (b'{"labels": {"0": Infinity}}', "expected a finite number, got Infinity"),
        (b'{"dice": 1e999}', "expected a finite number, got 1e999"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"image": "a\\u0000b"}', "NUL"),
        (b'{"image": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "utf-8"),
        (b'{"a": 1', "delimiter"),
        (b'{"a": ' + b"9" * 5000 + b"}", "limit"),
    ],
    ids=["deep", "deep object", "NaN", "infinity", "overflow", "twice", "NUL", "surrogate", "latin-1", "cut", "digits"],
)
def test_json_that_is_hostile_or_ambiguous_is_refused_by_its_name(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(data)
    path = tmp_path / "dataset.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"dataset\.json: expected JSON"):
        read_json(path)


@pytest.mark.parametrize("text", ["null", "3", "true", '"a"', "[]"])
def test_json_that_is_no_object_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: expected a JSON object"):
        read_json(tmp_path / "a.json")


def test_json_with_unusual_text_is_read() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": "\\\\u0000"}') == {"a": "\U0001f600", "b": "\\u0000"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**23, -1e300])
def test_a_number_beyond_all_bounds_is_found_by_its_place(value: float) -> None:
    found = find_extreme_number({"objectives": [{"name": "x"}, {"weight": value}], "flag": True})
    assert found is not None
    assert found[0] == "objectives.1.weight"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("lr=.inf", "lr: expected a finite number"),
        ("lr=1.0e+300", "lr: expected a finite number of at most 1e+15"),
        ("lr=11", "lr: expected a number of at most 10, got 11"),
        ("objectives.0.weight=.nan", "objectives.0.weight: expected a finite number"),
        ("objectives.0.weight=.inf", "objectives.0.weight: expected a finite number"),
        ("max_steps=100000000000000000000000", "max_steps: expected a finite number of at most 1e"),
        ("batch_size=1000000000", "batch_size: expected a number of at most 65536"),
        ("views.shape=[1,1]", "views.shape.0: expected a number of at least 2, got 1"),
        ("views.shape=[8]", "views.shape: expected a list of length 2 or more"),
        ("warmup_steps=1000000", "warmup_steps: expected at most max_steps"),
        ("workers=1000", "workers: expected a number of at most 256, got 1000"),
        ("prefetch=100000", "prefetch: expected a number of at most 1000"),
    ],
)
def test_a_senseless_number_is_refused_with_its_key(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config("pretrain", "test-2d-local-dim", [assignment])
    assert message in str(error.value)


def test_fewer_steps_than_the_warm_up_of_a_preset_shorten_it(tmp_path: Path) -> None:
    assert load_config("pretrain", "test-2d-local-dim", ["max_steps=50"]).warmup_steps == 10
    assert load_config("pretrain", "test-2d-local-dim", ["max_steps=5"]).warmup_steps == 0
    path = tmp_path / "short.yaml"
    path.write_text("{extends: test-2d-local-dim, max_steps: 9}")
    assert load_config("pretrain", str(path)).warmup_steps == 0
    path.write_text("{extends: test-2d-local-dim, max_steps: 9, warmup_steps: 10}")
    with pytest.raises(UsageError, match="warmup_steps: expected at most max_steps"):
        load_config("pretrain", str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"image,label\na,\xff\n", "UTF-8"),
        (b"image,label\na,b\nc", r"line 3: expected 2 cells, got 1"),
        (b"image,label\na,b,c\n", r"line 2: expected 2 cells, got 3"),
        (b'image,label\n"a,b\n', r"line 2: expected a row of a CSV file"),
        (b"image,label\na,\0\n", "NUL"),
        (b"image,image\na,b\n", "one column per name"),
        (b"image,label\na," + b"x" * 200_000 + b"\n", r"line 2: expected a row of a CSV file"),
    ],
    ids=["latin-1", "cut", "longer", "quote", "NUL", "twice", "long"],
)
def test_a_damaged_table_is_refused_by_name_and_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "quality.csv"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"quality\.csv.*" + message):
        read_csv(path)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_table_that_is_no_file_is_refused_without_waiting(kind: str, tmp_path: Path) -> None:
    path = {"pipe": tmp_path / "pipe", "device": Path("/dev/zero"), "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(UserError, match="expected a file, got a folder, a pipe or a device"):
        read_table(TableFile(path), "labels", from_user=True)


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_formula_is_written_as_text_and_read_as_it_was(cell: str, tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_csv(path, ["image", cell], [[cell, -1.5], ["scan", None]])
    written = path.read_bytes().decode()
    assert not any(
        part.lstrip('"')[:1] in {"=", "+", "@", "\t", "\r"} for part in written.replace("\n", ",").split(",")
    )
    content = read_csv(path)
    assert content.columns == ("image", cell)
    assert content.rows[0] == {"image": cell, cell: "-1.5"}


def test_numbers_and_names_are_written_as_they_are() -> None:
    cells = [-1.5, "-1.5", "1e-3", "O'Brien", "a=b", "", "p-0123456789ab", None]
    assert [escape_formula(cell) for cell in cells] == cells


@given(st.text())
def test_every_cell_is_read_as_it_was_written(cell: str) -> None:
    escaped = str(escape_formula(cell))
    assert unescape_formula(escaped) == cell or escaped == cell
