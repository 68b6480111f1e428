"""Damaged files of runs, indexes, stores, studies and packages, and each command that reads them."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tests.attack.base import TRAIN
from tests.attack.case import (
    EXIT_CODE,
    MAX_SECONDS,
    OTHER,
    VOXELS,
    Case,
    Check,
    Finding,
    Outcome,
    copy_parts,
    run_command,
)
from tests.attack.damage import Damage, draw_damage, iterate_damages, update_checksums

N_TEXT, N_BINARY, N_EXPORT, N_WITHOUT_KEY = 8, 7, 2, 66
MAX_EXPORT_SECONDS = 300.0  # the gates run the graph several times
FINETUNE = ("finetune", "--task", "classification", "--config", "fine.yaml", *TRAIN)
PRETRAIN = ("pretrain", "--modality", "xray", "--config", "pre.yaml", *TRAIN)
RESUME = (*PRETRAIN, "--data", "index", "--out", "pre", "--resume")
RESUME_FINETUNE = (*FINETUNE, "--data", "index", "--encoder", "pre", "--out", "cls", "--resume")


@dataclass(frozen=True)
class Target:
    """A file, and a command that reads it.

    Attributes:
        file: path of the file in the folder of the runs.
        command: arguments; `OUT` is a new folder.
        is_protected: whether each change of the file must be detected, or leave the result as it is.
        removed: files that are removed first, so that the command reads the file.
    """

    file: str
    command: tuple[str, ...]
    is_protected: bool = False
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.command[:3])}"

    def list_parts(self, base: Path) -> set[str]:
        """List the parts of the base that the command needs."""
        parts = {Path(word).parts[0] for word in (self.file, *self.command) if word != "."}
        if "index" in parts or "store" in parts:
            parts |= {"png", "index"}
        return {part for part in parts if (base / part).exists()}

    def build_case(self, base: Path, damage: Damage, check: Check | None = None) -> Case:
        """Build the case of one damage."""
        return Case(
            name=f"{self}: {damage.name}",
            kind=self.file,
            prepare=partial(self._prepare, base, damage),
            act=partial(run_command, *self.command),
            check=check or partial(self._check, base),
            max_seconds=MAX_EXPORT_SECONDS if self.command[0] == "export" else MAX_SECONDS,
        )

    def _prepare(self, base: Path, damage: Damage, folder: Path) -> None:
        copy_parts(base, folder, self.list_parts(base))
        for name in self.removed:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        file = folder / self.file
        file.write_bytes(damage.data)
        package = next((parent for parent in file.parents if (parent / "SHA256SUMS").is_file()), None)
        if package and not file.name.startswith("SHA256SUMS"):
            update_checksums(package, file)

    def _check(self, base: Path, folder: Path, outcome: Outcome) -> Finding | None:
        if outcome.exit_code:
            names = {f"{Path(self.file).stem}.", Path(self.file).name}  # or the weights beside their spec
            names |= {f"config {Path(self.file).stem}:"} if self.file.endswith(".yaml") else set()
            names |= {"rejected.csv"} if self.command[0] == "predict" else set()
            names |= {f"{Path(self.file).parts[0]}:", "SHA256SUMS"} if not _is_text(self.file) else set()
            if not any(name in outcome.output for name in names):
                return Finding(OTHER, f"file not named: {' '.join(outcome.output.split())[-160:]}")
            return None
        if self.is_protected and not _has_same_weights(base, folder):
            return Finding(VOXELS, "the damage has an effect and was accepted")
        return None


def _is_text(file: str) -> bool:
    return Path(file).suffix in (".json", ".yaml", ".csv")


def _has_same_weights(base: Path, folder: Path) -> bool:
    """Whether a training that was completed has the weights of the undamaged run."""
    for path, original in (
        ("OUT/encoder/encoder.json", "pre/encoder/encoder.json"),
        ("pre/encoder/encoder.json", "pre/encoder/encoder.json"),
        ("cls/model/model.json", "cls/model/model.json"),
    ):
        if (folder / path).is_file():
            return bool(
                json.loads((folder / path).read_bytes())["sha256"]
                == json.loads((base / original).read_bytes())["sha256"]
            )
    return False


def list_text_targets(base: Path) -> list[Target]:
    """List the text files of the runs, each with the commands that read it."""
    pretrain, out = (*PRETRAIN, "--out", "OUT"), ("--out", "OUT")
    finetune = (*FINETUNE, *out)
    evaluate = ("evaluate", "cls", "--data", "index", *out)
    readers: dict[str, list[tuple[str, ...]]] = {
        "pre.yaml": [(*pretrain, "--data", "index")],
        "fine.yaml": [(*finetune, "--data", "index")],
        "png/labels.csv": [("index", "png", "--modality", "xray", "--labels", "png/labels.csv", *out)],
        "png/subjects.csv": [("index", "png", "--modality", "xray", "--subjects", "png/subjects.csv", *out)],
        "index/summary.json": [
            ("preprocess", "index", "--modality", "xray", "--config", "pre.yaml", *out),
            ("report", "index"),
        ],
        "index/rejected.csv": [("report", "index")],
        "index/.medim": [("index", "png", "--modality", "xray", "--out", "index", "--overwrite")],
        "store/store.json": [(*pretrain, "--data", "store")],
        "store/summary.json": [("report", "store")],
        "store/quality.csv": [("report", "store")],
        "pre/encoder/encoder.json": [
            ("embed", "pre", "png", "--out", "OUT.npz"),
            (*finetune, "--data", "index", "--encoder", "pre"),
            ("probe", "pre", "--data", "index", "--seeds", "1", "--labelled", "8", *out),
            ("export", "pre", *out),
        ],
        "pre/encoder/critic.json": [
            ("embed", "pre", "png", "--out", "OUT.npz", "--mi-map-dir", "OUT"),
            ("export", "pre", *out),
        ],
        "pre/encoder/fingerprints.json": [(*finetune, "--data", "index", "--encoder", "pre")],
        "pre/summary.json": [("report", "pre"), ("export", "pre", *out)],
        "pre/history.csv": [("report", "pre")],
        "pre/config.yaml": [("report", "pre"), RESUME],
        "pre/inputs.json": [RESUME],
        "pre/mlflow.json": [RESUME],
        "pre/split.csv": [("index", "png", "--modality", "xray", "--labels", "pre/split.csv", *out)],
        "cls/model/model.json": [
            evaluate,
            ("export", "cls", *out),
            (*finetune, "--data", "index", "--encoder", "cls"),
        ],
        "cls/model/fingerprints.json": [evaluate],
        "cls/config.yaml": [("report", "cls"), RESUME_FINETUNE],
        "cls/inputs.json": [RESUME_FINETUNE],
        "cls/mlflow.json": [RESUME_FINETUNE],
        "cls/history.csv": [("report", "cls")],
        "cls/rejected.csv": [("report", "cls")],
        "eval/pictures.json": [("report", "eval")],
        "cls/summary.json": [("report", "cls"), ("export", "cls", *out)],
        "eval/metrics.json": [("report", "eval")],
        "eval/summary.json": [("report", "eval")],
        "pkg/medim.json": [
            ("verify", "pkg"),
            ("predict", "pkg", "png", *out),
            ("evaluate", "pkg", "--data", "index", *out),
        ],
        "pkg/SHA256SUMS": [("verify", "pkg"), ("predict", "pkg", "xray.png", *out)],
        "pkg/model_card.json": [("verify", "pkg")],
        "pkg/parity/report.json": [("verify", "pkg"), ("report", ".")],
        "pkg/fingerprints.json": [("evaluate", "pkg", "--data", "index", *out)],
        "trusted.pub": [("verify", "pkg", "--public-key", "trusted.pub")],
        "trusted.pem": [("export", "cls", *out, "--private-key", "trusted.pem")],
        "study/summary.json": [("report", "study")],
        "study/design.json": [("report", "study")],
        "study/audit.json": [("report", "study")],
        "study/pretraining.json": [("report", "study")],
        "study/worst.json": [("report", "study")],
        "study/config.yaml": [("report", "study")],
    }
    targets = [Target(file, command) for file, commands in readers.items() for command in commands]
    return [target for target in targets if (base / target.file).is_file()]


def list_binary_targets(base: Path) -> list[Target]:
    """List the binary files of the runs, each with the commands that read it."""
    out = ("--out", "OUT")
    chunk = min((base / "store").glob("*/*.b2nd")).relative_to(base).as_posix()
    last, earlier = sorted((base / "pre/checkpoints").glob("*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))[
        :-3:-1
    ]
    classifier = max((base / "cls/checkpoints").glob("*.ckpt"))
    unfinished = ("pre/summary.json", "pre/encoder")
    protected: list[Target] = [
        Target("pre/encoder/encoder.safetensors", ("embed", "pre", "png", "--out", "OUT.npz")),
        Target("pre/encoder/encoder.safetensors", (*FINETUNE, "--data", "index", "--encoder", "pre", *out)),
        Target("pre/encoder/critic.safetensors", ("export", "pre", *out)),
        Target("cls/model/model.safetensors", ("evaluate", "cls", "--data", "index", *out)),
        Target("pkg/models/model.safetensors", ("verify", "pkg")),
        Target("pkg/models/reference.safetensors", ("predict", "pkg", "xray.png", *out)),
        Target("pkg/models/model.onnx", ("verify", "pkg")),
        Target("pkg/parity/golden.safetensors", ("verify", "pkg")),
        Target(chunk, (*PRETRAIN, "--data", "store", *out)),
        Target(last.relative_to(base).as_posix(), RESUME, removed=unfinished),
        Target(
            earlier.relative_to(base).as_posix(),
            RESUME,
            removed=(*unfinished, last.relative_to(base).as_posix()),
        ),
        Target(
            classifier.relative_to(base).as_posix(),
            RESUME_FINETUNE,
            removed=("cls/summary.json", "cls/model"),
        ),
    ]
    others = [
        Target("index/index.parquet", ("preprocess", "index", "--modality", "xray", "--config", "pre.yaml", *out)),
        Target("index/index.parquet", ("report", "index")),
        Target("index/index.parquet", (*FINETUNE, "--data", "index", *out)),
        Target("store/index.parquet", (*PRETRAIN, "--data", "store", *out)),
        Target("eval/cases.parquet", ("report", "eval")),
        Target("study/results.parquet", ("report", "study")),
        Target("pre/figures/views.png", ("report", "pre")),
        Target("mlflow.db", (*PRETRAIN, "--data", "index", *out)),
        Target("xray.png", ("predict", "pkg", "xray.png", *out)),
    ]
    targets = [*(replace(target, is_protected=True) for target in protected), *others]
    return [target for target in targets if (base / target.file).is_file()]


def list_run_cases(base: Path, seed: int) -> list[Case]:
    """List damaged text files, damaged binary files, and files of other programs."""
    cases = []
    for target in list_text_targets(base):
        draw = random.Random(f"{seed} {target}")
        damages = list(iterate_damages(base / target.file))
        count = N_EXPORT if target.command[0] == "export" else N_TEXT  # a successful export takes half a minute
        cases += [target.build_case(base, damage) for damage in draw.sample(damages, min(count, len(damages)))]
    for target in list_binary_targets(base):
        draw = random.Random(f"{seed} {target}")
        data = (base / target.file).read_bytes()
        check = _check_database if target.file == "mlflow.db" else None
        for damage in _draw_damages(data, draw):
            cases.append(target.build_case(base, damage, check))
    return [*cases, *_list_foreign_cases(base)]


def _draw_damages(data: bytes, draw: random.Random) -> Iterator[Damage]:
    yield Damage("empty", b"")
    for _ in range(N_BINARY - 1):
        damage: Damage = draw_damage(data, draw)
        while damage.data == data:
            damage = draw_damage(data, draw)
        yield damage


def _check_database(folder: Path, outcome: Outcome) -> Finding | None:
    """A damaged database of records stops no training, or ends before it."""
    if outcome.exit_code and "mlflow" not in outcome.output.lower():
        return Finding(OTHER, f"file not named: {' '.join(outcome.output.split())[-160:]}")
    if outcome.exit_code == 0 and not (folder / "OUT/summary.json").is_file():
        return Finding(EXIT_CODE, "0 without a result")
    return None


def _list_foreign_cases(base: Path) -> list[Case]:
    """List checkpoints, weights and databases of other programs."""
    cases = []
    targets = {target.file: target for target in list_binary_targets(base)}
    for file, contents in {
        "mlflow.db": _FOREIGN_DATABASES,
        "pre/encoder/encoder.safetensors": _FOREIGN_WEIGHTS,
        "cls/model/model.safetensors": _FOREIGN_WEIGHTS,
        "pkg/models/model.safetensors": _FOREIGN_WEIGHTS,
        **{name: _FOREIGN_CHECKPOINTS for name in targets if name.endswith(".ckpt")},
    }.items():
        check = _check_database if file == "mlflow.db" else None
        for name, write in contents.items():
            path = base.parent / "foreign"
            path.unlink(missing_ok=True)
            write(path)
            damage = Damage(name, path.read_bytes())
            cases.append(targets[file].build_case(base, damage, check))
            path.unlink()
    return cases


def _write_database(path: Path, *, sql: str) -> None:
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(sql)


def _write_lightning_checkpoint(path: Path) -> None:
    """A checkpoint as another program writes it with Lightning."""
    weights = {"model.layer.weight": torch.zeros(4, 4), "model.layer.bias": torch.zeros(4)}
    content = {"epoch": 3, "global_step": 6, "pytorch-lightning_version": "2.4.0", "state_dict": weights}
    torch.save({**content, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}, path)


class _Opener:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("pickle-was-run", "w")


def _write_hostile_pickle(path: Path) -> None:
    torch.save({"state_dict": _Opener()}, path)


_FOREIGN_DATABASES: dict[str, Callable[[Path], None]] = {
    "another database": partial(_write_database, sql="CREATE TABLE t (x); INSERT INTO t VALUES (1);"),
    "tables with other columns": partial(
        _write_database, sql="CREATE TABLE experiments (x); CREATE TABLE runs (y); CREATE TABLE alembic_version (z);"
    ),
    "a later version": partial(
        _write_database,
        sql="CREATE TABLE alembic_version (version_num VARCHAR(32)); "
        "INSERT INTO alembic_version VALUES ('ffffffffffff')",
    ),
}
_FOREIGN_WEIGHTS: dict[str, Callable[[Path], None]] = {
    "another shape": lambda path: safetensors.torch.save_file({"layer.weight": torch.zeros(3, 3)}, path),
    "a torch pickle": lambda path: torch.save({"layer.weight": torch.zeros(3, 3)}, path),
    "a pickle that opens a file": _write_hostile_pickle,
    "an array of numpy": lambda path: np.lib.format.write_array(path.open("wb"), np.zeros(3)),
}
_FOREIGN_CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    **_FOREIGN_WEIGHTS,
    "a Lightning checkpoint": _write_lightning_checkpoint,
}


def list_specs_without_a_key(base: Path, _: int) -> list[Case]:
    """List specs and contracts that lack one key, in turn for each command."""
    cases = []
    for target in list_text_targets(base):
        if Path(target.file).name not in ("encoder.json", "model.json", "critic.json", "medim.json", "decoder.json"):
            continue
        content = json.loads((base / target.file).read_bytes())
        for key in list(content)[:: 8 if target.command[0] == "export" else 1]:
            rest = {name: value for name, value in content.items() if name != key}
            cases.append(target.build_case(base, Damage(f"without {key}", json.dumps(rest).encode())))
    return random.Random(0).sample(cases, min(N_WITHOUT_KEY, len(cases)))
