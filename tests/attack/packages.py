"""Changed packages, with and without a signature, and safetensors whose headers lie."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.numpy

from medim.integrity import write_sums
from tests.attack.base import TRAIN
from tests.attack.case import EXIT_CODE, OTHER, Case, Finding, Outcome, copy_parts, expect_refusal, run_command
from tests.attack.damage import update_checksums


def _change_json(name: str, change: Callable[[dict[str, object]], object], folder: Path) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def _swap_classes(content: dict[str, object]) -> None:
    content["classes"] = list(reversed(content["classes"]))  # type: ignore[call-overload]


def _shorten_preprocessing(content: dict[str, object]) -> None:
    content["architecture"]["preprocessing"] = [{"op": "rescale"}]  # type: ignore[index]


def _flip_byte(name: str, folder: Path) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def _replace_weights(folder: Path) -> None:
    path = folder / "models/model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({name: np.asarray(array + np.ones_like(array)) for name, array in arrays.items()}, path)


def _remove(name: str, folder: Path) -> None:
    (folder / name).unlink()


def _replace_by_link(name: str, folder: Path) -> None:
    target = folder.parent / "elsewhere"
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def _add_file(name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")


def _add_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def _edit_sums(old: str, new: str, folder: Path) -> None:
    text = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(text.replace(old, new))


def _repeat_sums(folder: Path) -> None:
    text = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(text + text.splitlines()[0] + "\n")


def _write_safetensors(header: object, data: bytes, folder: Path, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / "models/model.safetensors").write_bytes(size.to_bytes(8, "little") + text + data)


def _entry(dtype: str = "F32", shape: list[int] | None = None, offsets: tuple[int, int] = (0, 4)) -> dict[str, object]:
    return {"weight": {"dtype": dtype, "shape": [1] if shape is None else shape, "data_offsets": offsets}}


_LIES: dict[str, Callable[[Path], None]] = {
    "header of a terabyte": partial(_write_safetensors, b"{}", b"", length=1 << 40),
    "negative header": partial(_write_safetensors, b"{}", b"", length=(1 << 64) - 1),
    "no JSON": partial(_write_safetensors, b"{", b""),
    "deep JSON": partial(_write_safetensors, b"[" * 100_000, b""),
    "not UTF-8": partial(_write_safetensors, b'{"\xff":1}', b""),
    "shape of a terabyte": partial(_write_safetensors, _entry(shape=[1 << 38]), bytes(4)),
    "shape that overflows": partial(_write_safetensors, _entry(shape=[1 << 62, 4]), bytes(4)),
    "negative shape": partial(_write_safetensors, _entry(shape=[-1]), bytes(4)),
    "offsets outside": partial(_write_safetensors, _entry(offsets=(0, 400)), bytes(4)),
    "offsets reversed": partial(_write_safetensors, _entry(offsets=(4, 0)), bytes(4)),
    "overlapping offsets": partial(_write_safetensors, {**_entry(), "b": _entry()["weight"]}, bytes(4)),
    "gap between arrays": partial(_write_safetensors, _entry(offsets=(4, 8)), bytes(8)),
    "Python objects": partial(_write_safetensors, _entry(dtype="O"), bytes(4)),
    "unknown type": partial(_write_safetensors, _entry(dtype="F8_E4M3"), bytes(4)),
    "other arrays": partial(_write_safetensors, _entry(), bytes(4)),
    "junk at the end": partial(_write_safetensors, _entry(), bytes(400)),
    "a pickle": lambda folder: (folder / "models/model.safetensors").write_bytes(pickle.dumps([1.0])) and None,
    "NaN": lambda folder: _write_nan(folder),
}


def _write_nan(folder: Path) -> None:
    path = folder / "models/model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    changed = {name: array * np.float32(np.nan) if array.ndim else array for name, array in arrays.items()}
    safetensors.numpy.save_file(changed, path)


_CHANGES: dict[str, Callable[[Path], None]] = {
    "flipped weights": partial(_flip_byte, "models/model.safetensors"),
    "flipped graph": partial(_flip_byte, "models/model.onnx"),
    "flipped golden inputs": partial(_flip_byte, "parity/golden.safetensors"),
    "flipped contract": partial(_flip_byte, "medim.json"),
    "flipped statistics": partial(_flip_byte, "models/reference.safetensors"),
    "other weights": _replace_weights,
    "classes reversed": partial(_change_json, "medim.json", _swap_classes),
    "preprocessing of one step": partial(_change_json, "medim.json", _shorten_preprocessing),
    "no fingerprints": partial(_remove, "fingerprints.json"),
    "no contract": partial(_remove, "medim.json"),
    "no sums": partial(_remove, "SHA256SUMS"),
    "no graph": partial(_remove, "models/model.onnx"),
    "weights as a link": partial(_replace_by_link, "models/model.safetensors"),
    "contract as a link": partial(_replace_by_link, "medim.json"),
    "an extra file": partial(_add_file, "extra.json"),
    "an extra module": partial(_add_file, "sitecustomize.py"),
    "a file of a desktop": partial(_add_file, ".DS_Store"),
    "a pipe": _add_pipe,
    "sums of a file outside": partial(_edit_sums, "  medim.json", "  ../medim.json"),
    "sums of an absolute path": partial(_edit_sums, "  medim.json", "  /etc/passwd"),
    "sums twice": _repeat_sums,
    "sums in capitals": partial(_edit_sums, "a", "A"),
}
# Changes that only a signature detects if the sums are recomputed: a low bit of a weight of the graph or of a golden
# output changes the results by less than the tolerance.
_UNSIGNED_IS_ACCEPTED = {
    "no fingerprints",
    "an extra file",
    "an extra module",
    "a file of a desktop",
    "flipped graph",
    "flipped golden inputs",
    "flipped statistics",
}


def _is_about_sums(name: str) -> bool:
    return "sums" in name


def list_package_cases(base: Path, _: int) -> list[Case]:
    """List changed packages: as they are, with recomputed sums, and signed ones with recomputed sums."""
    cases = []
    commands: dict[str, tuple[str, ...]] = {
        "verify": ("verify", "pkg"),
        "predict": ("predict", "pkg", "xray.png", "--out", "OUT"),
        "embed": ("embed", "pkg", "xray.png", "--out", "OUT.npz"),
        "evaluate": ("evaluate", "pkg", "--data", "index", "--out", "OUT", "--split", "all"),
        "finetune": (
            *("finetune", "--task", "classification", "--data", "index", "--config", "fine.yaml", "--encoder", "pkg"),
            *("--out", "OUT", *TRAIN),
        ),
        "probe": ("probe", "pkg", "--data", "index", "--seeds", "1", "--labelled", "8", "--out", "OUT"),
    }
    for number, (name, change) in enumerate(_CHANGES.items()):
        for command_name in ("verify", list(commands)[1 + number % (len(commands) - 1)]):
            cases.append(_build_case(base, f"{name}, {command_name}", change, commands[command_name], _expect_invalid))
    for name, change in {**_CHANGES, **_LIES}.items():
        if not _is_about_sums(name):
            check = _accept_valid if name in _UNSIGNED_IS_ACCEPTED else _expect_invalid
            steps = partial(_change_with_sums, change)
            cases.append(_build_case(base, f"{name}, sums recomputed", steps, ("verify", "pkg"), check))
    if (base / "signed").is_dir():
        for name, change in {**_CHANGES, **_LIES}.items():
            command = ("verify", "pkg", "--public-key", "trusted.pub")
            steps = partial(_change_with_sums, change) if not _is_about_sums(name) else change
            cases.append(_build_case(base, f"{name}, signed", steps, command, _expect_invalid, source="signed"))
        cases += _list_signature_cases(base)
    return cases


def _list_signature_cases(base: Path) -> list[Case]:
    verify = ("verify", "pkg", "--public-key")
    forms: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
        "another key": (lambda _: None, (*verify, "other.pub")),
        "no signature": (partial(_remove, "SHA256SUMS.sig"), (*verify, "trusted.pub")),
        "an empty signature": (
            lambda folder: (folder / "SHA256SUMS.sig").write_bytes(b"") and None,
            (*verify, "trusted.pub"),
        ),
        "a flipped signature": (partial(_flip_byte, "SHA256SUMS.sig"), (*verify, "trusted.pub")),
        "a signature of zeros": (
            lambda folder: (folder / "SHA256SUMS.sig").write_bytes(bytes(64)) and None,
            (*verify, "trusted.pub"),
        ),
        "a long signature": (
            lambda folder: (folder / "SHA256SUMS.sig").write_bytes(bytes(1 << 22)) and None,
            (*verify, "trusted.pub"),
        ),
        "no signature, no key": (partial(_remove, "SHA256SUMS.sig"), ("verify", "pkg")),
    }
    return [
        _build_case(base, name, change, command, _expect_invalid, source="signed")
        for name, (change, command) in forms.items()
    ]


def _change_with_sums(change: Callable[[Path], None], folder: Path) -> None:
    signature = (folder / "SHA256SUMS.sig").read_bytes() if (folder / "SHA256SUMS.sig").is_file() else None
    change(folder)
    (folder / "SHA256SUMS").unlink()
    write_sums(folder)
    update_checksums(folder, folder / "medim.json") if (folder / "medim.json").is_file() else None
    if signature is not None:
        lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
        (folder / "SHA256SUMS").write_text("".join(line for line in lines if ".sig" not in line))


def _build_case(
    base: Path,
    name: str,
    change: Callable[[Path], None],
    command: tuple[str, ...],
    check: Callable[[Path, Outcome], Finding | None],
    *,
    source: str = "pkg",
) -> Case:
    def prepare(folder: Path) -> None:
        """Copy the package and change it."""
        copy_parts(base, folder, ["trusted.pub", "other.pub", "fine.yaml", "xray.png"])
        if "index" in command:
            copy_parts(base, folder, ["index", "png"])
        shutil.copytree(base / source, folder / "pkg")
        change(folder / "pkg")

    return Case(name=name, kind=command[0], prepare=prepare, act=partial(run_command, *command), check=check)


def _accept_valid(_: Path, outcome: Outcome) -> Finding | None:
    return None if outcome.exit_code in (0, 3) else Finding(EXIT_CODE, f"{outcome.exit_code} instead of 0 or 3")


def _expect_invalid(folder: Path, outcome: Outcome) -> Finding | None:
    if (folder / "pickle-was-run").exists():
        return Finding(OTHER, "code of the package was run")
    return expect_refusal(3)(folder, outcome)
