"""Damage each file that medim reads, and run each command that reads it.

A damaged file must end with exit code 1 to 4 and one message that names the file, without a traceback, an unexpected
error or a wait of more than `MAX_SECONDS`; or the command must succeed, where the change has no meaning for it.

`python -m tests.malformed_files FOLDER [COUNT [TEXT]]` runs the cases on the runs in a folder (their names are
in `list_targets`) and prints the failures: all cases or a number per target, of all targets or of those with a text.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import medim

MAX_SECONDS = 60
HUGE = 10**23
_REMOVED = object()
JSON_VALUES: dict[str, Any] = {
    "removed": _REMOVED,
    "null": None,
    "list": [],
    "list of text": ["x"],
    "text": "x",
    "number": -1,
    "huge": HUGE,
    "true": True,
    "object": {},
    "NaN": float("nan"),
    "infinite": float("inf"),
}
MAX_KEY_DEPTH = 4


@dataclass(frozen=True)
class Target:
    """A file, and a command that reads it.

    Attributes:
        file: path of the file in the folder of the runs.
        command: arguments; `OUT` is replaced by a new folder.
    """

    file: str
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.command)}"


@dataclass(frozen=True)
class Damage:
    """One change of a file."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Result:
    """End of a command on a damaged file."""

    exit_code: int
    output: str
    seconds: float

    def describe_fault(self, target: Target) -> str | None:
        """Describe the fault; None if the command succeeded, or failed with a message that names the file."""
        if self.seconds > MAX_SECONDS:
            return "too slow"
        if "Traceback" in self.output:
            return "traceback"
        if "unexpected error" in self.output:
            return "unexpected error"
        if self.exit_code not in range(5):
            return f"exit code {self.exit_code}"
        if self.exit_code and f"{Path(target.file).stem}." not in self.output:  # or the weights beside their spec
            return "file not named"
        return None


def iterate_damages(path: Path) -> Iterator[Damage]:
    """Yield all changes of a file."""
    data = path.read_bytes()
    yield from iterate_byte_damages(data)
    if path.suffix == ".json":
        yield from iterate_json_damages(json.loads(data))
    elif path.suffix == ".yaml":
        yield from iterate_yaml_damages(data.decode())
    elif path.suffix == ".csv":
        yield from iterate_csv_damages(data.decode())


def iterate_byte_damages(data: bytes) -> Iterator[Damage]:
    """Yield changes that apply to every file."""
    yield Damage("empty", b"")
    for share in (0.3, 0.6, 0.97):
        yield Damage(f"cut at {share}", data[: int(len(data) * share)])
    middle = len(data) // 2
    yield Damage("not UTF-8", data[:middle] + b"\xff\xfe" + data[middle:])
    yield Damage("NUL", data[:middle] + b"\0" + data[middle:])
    yield Damage("twice", data + data)
    yield Damage("pickle", b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}.")


def iterate_json_damages(content: Any) -> Iterator[Damage]:
    """Yield changes of a JSON object: each key with each value of `JSON_VALUES`, and hostile documents."""
    yield Damage("a list", b"[]")
    yield Damage("an empty object", b"{}")
    yield Damage("NaN", b"NaN")
    yield Damage("deep", b"[" * 100_000 + b"]" * 100_000)
    yield Damage("deep object", b'{"a":' * 5000 + b"1" + b"}" * 5000)
    for place in iterate_places(content, MAX_KEY_DEPTH):
        for name, value in JSON_VALUES.items():
            changed = copy.deepcopy(content)
            parent = changed
            for key in place[:-1]:
                parent = parent[key]
            if value is _REMOVED:
                del parent[place[-1]]
            else:
                parent[place[-1]] = value
            yield Damage(f"{'.'.join(map(str, place))} {name}", json.dumps(changed, indent=1).encode())


def iterate_places(content: Any, depth: int) -> Iterator[tuple[Any, ...]]:
    """Yield the places of all values, of a list only the first item."""
    if depth and isinstance(content, dict):
        for key, value in content.items():
            yield (key,)
            yield from ((key, *rest) for rest in iterate_places(value, depth - 1))
    elif depth and isinstance(content, list) and content:
        yield (0,)
        yield from ((0, *rest) for rest in iterate_places(content[0], depth - 1))


def iterate_yaml_damages(text: str) -> Iterator[Damage]:
    """Yield hostile YAML documents, and changes of each line."""
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{name}: &{name} [{','.join([f'*{above}'] * 9)}]\n"
    yield Damage("alias bomb", bomb.encode())
    yield Damage("alias bomb in a section", (text + "\n" + bomb.replace("\n", "\n").replace("a: ", "zz: ", 1)).encode())
    yield Damage("recursive", b"encoder: &x {name: *x}\n")
    yield Damage("deep", b"[" * 5000 + b"]" * 5000)
    yield Damage("20 MB scalar", b"name: " + b"x" * 20_000_000)
    yield Damage("many keys", "\n".join(f"k{n}: 1" for n in range(50_000)).encode())
    yield Damage("tag", b"!!python/object/apply:os.system ['true']\n")
    yield Damage("date", text.encode() + b"\nname2: 2020-13-45\n")
    yield Damage("keys", b"{1: 2, null: 3, [1]: 4}\n")
    yield Damage("duplicate key", text.encode() + b"\n" + text.splitlines()[0].encode() + b"\n")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        key, colon, _ = line.partition(":")
        if not colon or line.startswith((" ", "-", "#")):
            continue
        for name, value in {
            **dict.fromkeys(("x", "-1", "0", "[]", "{}", "null", ".nan", ".inf", "1e300", "[1, 1]", "'1'"), ""),
            "huge": str(HUGE),
            "long": "x" * 10_000,
        }.items():
            changed = [*lines[:number], f"{key}: {value or name}", *lines[number + 1 :]]
            yield Damage(f"{key}={name}", "\n".join(changed).encode())


def iterate_csv_damages(text: str) -> Iterator[Damage]:
    """Yield changes of a table: each column removed, renamed or repeated, each cell of one row replaced."""
    rows = [line.split(",") for line in text.splitlines()]

    def join(changed: Sequence[Sequence[str]]) -> bytes:
        return ("\n".join(",".join(row) for row in changed) + "\n").encode()

    yield Damage("header only", join(rows[:1]))
    yield Damage("row cut", join([*rows[:-1], rows[-1][:-1]]))
    yield Damage("row longer", join([*rows[:-1], [*rows[-1], "x"]]))
    yield Damage("quote", join([*rows[:-1], ['"' + rows[-1][0], *rows[-1][1:]]]))
    yield Damage("long cell", join([*rows[:-1], ["x" * 200_000, *rows[-1][1:]]]))
    for column in range(len(rows[0])):
        yield Damage(f"column {column} removed", join([[*row[:column], *row[column + 1 :]] for row in rows]))
        yield Damage(f"column {column} renamed", join([[*rows[0][:column], "x", *rows[0][column + 1 :]], *rows[1:]]))
        for cell in ("", "x", "nan", "-1", "1e999", "'=1", str(HUGE)):
            changed = [*rows[:-1], [*rows[-1][:column], cell, *rows[-1][column + 1 :]]]
            yield Damage(f"cell {column} {cell[:6]!r}", join(changed))


def update_checksums(folder: Path, file: Path) -> None:
    """Update `SHA256SUMS` of an unsigned package, as an attacker would after a change."""
    sums = folder / "SHA256SUMS"
    name, digest = file.relative_to(folder).as_posix(), hashlib.sha256(file.read_bytes()).hexdigest()
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {name}")]
    sums.write_text("\n".join([*lines, f"{digest}  {name}"]) + "\n")


def run_here(command: Sequence[str]) -> Result:
    """Run a command in this process."""
    from typer.testing import CliRunner

    from medim.cli import app

    start = time.monotonic()
    result = CliRunner().invoke(app, list(command))
    return Result(result.exit_code, result.output, time.monotonic() - start)


def run_forked(command: Sequence[str]) -> Result:
    """Run a command in a child process, which has the imported modules of this one."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            os.setsid()
            with contextlib.suppress(BaseException):
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout, sys.stderr = io.TextIOWrapper(open(1, "wb", closefd=False)), sys.__stderr__  # noqa: SIM115
                result = run_here(command)
                os.write(1, result.output.encode(errors="replace"))
                os._exit(result.exit_code)
            os._exit(99)
        code: int | None = None
        while code is None and time.monotonic() - start < MAX_SECONDS + 1:
            done, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if done else None
            if code is None:
                time.sleep(0.01)
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = -9
        output.seek(0)
        return Result(code, output.read().decode(errors="replace"), time.monotonic() - start)


def try_damage(
    base: Path, work: Path, target: Target, damage: Damage, run: Callable[[Sequence[str]], Result]
) -> Result:
    """Run the command of a target on a copy of the folder with one damaged file."""
    shutil.rmtree(work, ignore_errors=True)
    copied = {Path(part).parts[0] for part in (target.file, *target.command) if part != "." and (base / part).exists()}
    copied |= {"png"} if "index" in copied else set()  # the images of the index
    work.mkdir()
    for name in copied:
        source = base / name
        shutil.copytree(source, work / name) if source.is_dir() else shutil.copy2(source, work / name)
    file = work / target.file
    file.write_bytes(damage.data)
    package = next((parent for parent in file.parents if (parent / "SHA256SUMS").is_file()), None)
    if package and file.name != "SHA256SUMS":
        update_checksums(package, file)
    previous = Path.cwd()
    os.chdir(work)
    try:
        return run(target.command)
    finally:
        os.chdir(previous)


def list_targets(base: Path) -> list[Target]:
    """List the files of the runs that `build_base` makes, each with the commands that read it."""
    train = ("--accelerator", "cpu", "--out", "OUT")
    finetune = ("finetune", "--task", "classification", "--config", "fine.yaml", *train)
    readers: dict[str, list[tuple[str, ...]]] = {
        "pre.yaml": [("pretrain", "--modality", "xray", "--data", "index", "--config", "pre.yaml", *train)],
        "fine.yaml": [(*finetune, "--data", "index", "--from-scratch")],
        "index/summary.json": [
            ("preprocess", "index", "--modality", "xray", "--config", "pre.yaml", "--out", "OUT"),
            ("report", "index"),
        ],
        "index/rejected.csv": [("report", "index")],
        "store/store.json": [("pretrain", "--modality", "xray", "--data", "store", "--config", "pre.yaml", *train)],
        "store/summary.json": [("report", "store")],
        "store/quality.csv": [("report", "store")],
        "pre/encoder/encoder.json": [
            ("embed", "pre", "png", "--out", "OUT.npz"),
            (*finetune, "--data", "index", "--encoder", "pre"),
            ("probe", "pre", "--data", "index", "--seeds", "1", "--labelled", "8", "--out", "OUT"),
            ("export", "pre", "--out", "OUT"),
        ],
        "pre/encoder/critic.json": [
            ("embed", "pre", "png", "--out", "OUT.npz", "--mi-map-dir", "OUT"),
            ("export", "pre", "--out", "OUT"),
        ],
        "pre/encoder/fingerprints.json": [(*finetune, "--data", "index", "--encoder", "pre")],
        "pre/summary.json": [("report", "pre"), ("export", "pre", "--out", "OUT")],
        "pre/history.csv": [("report", "pre")],
        "pre/config.yaml": [
            ("report", "pre"),
            ("pretrain", "--modality", "xray", "--data", "index", "--config", "pre.yaml", "--out", "pre", "--resume"),
        ],
        "pre/inputs.json": [
            ("pretrain", "--modality", "xray", "--data", "index", "--config", "pre.yaml", "--out", "pre", "--resume")
        ],
        "cls/model/model.json": [
            ("evaluate", "cls", "--data", "index", "--out", "OUT"),
            ("export", "cls", "--out", "OUT"),
            (*finetune, "--data", "index", "--encoder", "cls"),
        ],
        "cls/model/fingerprints.json": [("evaluate", "cls", "--data", "index", "--out", "OUT")],
        "cls/summary.json": [("report", "cls"), ("export", "cls", "--out", "OUT")],
        "eval/metrics.json": [("report", "eval")],
        "eval/summary.json": [("report", "eval")],
        "pkg/medim.json": [
            ("verify", "pkg"),
            ("predict", "pkg", "png", "--out", "OUT"),
            ("evaluate", "pkg", "--data", "index", "--out", "OUT"),
        ],
        "pkg/parity/report.json": [("verify", "pkg"), ("report", ".")],
        "pkg/fingerprints.json": [("evaluate", "pkg", "--data", "index", "--out", "OUT")],
        "study/summary.json": [("report", "study")],
        "study/audit.json": [("report", "study")],
        "study/pretraining.json": [("report", "study")],
        "study/worst.json": [("report", "study")],
        "study/config.yaml": [("report", "study")],
    }
    targets = [Target(file, command) for file, commands in readers.items() for command in commands]
    return [target for target in targets if (base / target.file).is_file()]


def main(arguments: Sequence[str]) -> int:
    """Run cases and print the failures.

    Args:
        arguments: folder of the runs, number of cases per target (0: all), and a text that the targets contain.
    """
    base = Path(arguments[0]).resolve()
    count = int(arguments[1]) if len(arguments) > 1 else 0
    targets = [target for target in list_targets(base) if len(arguments) < 3 or arguments[2] in str(target)]
    for module in pkgutil.walk_packages(medim.__path__, "medim."):  # the children share the imported modules
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    total, faults = 0, Counter[str]()
    for target in targets:
        damages = list(iterate_damages(base / target.file))
        if count:
            damages = random.Random(str(target)).sample(damages, min(count, len(damages)))
        bad = 0
        for damage in damages:
            result = try_damage(base, base.with_name(base.name + "-work"), target, damage, run_forked)
            total += 1
            if fault := result.describe_fault(target):
                bad += 1
                faults[fault] += 1
                last_line = " ".join(result.output.split())[-160:]
                print(f"FAULT {fault} | {target} | {damage.name} | {result.exit_code} | {last_line}", flush=True)
        print(f"{len(damages)} cases, {bad} faults: {target}", flush=True)
    print(f"{total} cases, {sum(faults.values())} faults: {dict(faults)}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
