"""Values of `--set`, and hand-made configurations, tables, `dataset.json` files and sources."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.attack.base import FINETUNE_CONFIG, PRETRAIN_CONFIG, TRAIN
from tests.attack.case import EXIT_CODE, OTHER, Case, Check, Finding, Outcome, copy_parts, expect_refusal, run_command
from tests.data.synthetic import noise, write_nifti

PRETRAIN = ("pretrain", "--modality", "xray", "--data", "index", "--config", "pre.yaml", "--out", "OUT", *TRAIN)
FINETUNE = (
    *("finetune", "--task", "classification", "--data", "index", "--config", "fine.yaml"),
    *("--out", "OUT", *TRAIN),
)
REFUSED_SETTINGS = (
    *("lr=.inf", "lr=.nan", "lr=-1", "lr=1e300", "lr=x", "lr=[]", "lr=null", "lr={}", "lr=true", "lr='1e-3'x"),
    *("max_steps=0", "max_steps=-1", "max_steps=1e23", "max_steps=100000000000000000000000", "max_steps=1.5"),
    *("batch_size=0", "batch_size=-4", "batch_size=1000000000", "batch_size=x", "batch_size=1e400"),
    *("views.shape=[]", "views.shape=[0, 0]", "views.shape=[8]", "views.shape=[8, 8, 8]", "views.shape=[-8, 8]"),
    *("views.shape=[1000000, 1000000]", "views.count=0", "views.count=-1", "views.count=1000000"),
    *("encoder.channels=[]", "encoder.channels=[0, 8]", "encoder.channels=[4, -8]", "encoder.summary_channels=0"),
    *("encoder.channels=[1000000000, 8]", "encoder.name=nosuch", "encoder=null", "encoder.nosuch=1"),
    *("objectives=[]", "objectives.0.weight=.nan", "objectives.0.weight=.inf", "objectives.5.weight=1"),
    *("objectives.0.name=nosuch", "workers=100000", "workers=-1", "checkpoint_every_steps=0"),
    *("warmup_steps=-1", "nosuch=1", "modality=ct", "=1", "lr"),
)
ACCEPTED_SETTINGS = ("lr=1e-3", "max_steps=2", "batch_size=2", "warmup_steps=2")


def list_setting_cases(base: Path, _: int) -> list[Case]:
    """List `--set` values: senseless ones, which must be refused before training, and ordinary ones."""
    return [
        Case(
            name=f"--set {setting}",
            kind="refused" if is_refused else "accepted",
            prepare=partial(_prepare_runs, {}, base),
            act=partial(run_command, *PRETRAIN, "--set", setting),
            check=expect_refusal(1, 2) if is_refused else _expect_success,
        )
        for is_refused, settings in ((True, REFUSED_SETTINGS), (False, ACCEPTED_SETTINGS))
        for setting in settings
    ]


def _expect_success(_: Path, outcome: Outcome) -> Finding | None:
    if outcome.exit_code:
        return Finding(EXIT_CODE, f"{outcome.exit_code}: {' '.join(outcome.output.split())[-160:]}")
    return None


def _prepare_runs(files: Mapping[str, bytes], base: Path, folder: Path) -> None:
    copy_parts(base, folder, ["png", "index", "pre.yaml", "fine.yaml"])
    for name, data in files.items():
        (folder / name).write_bytes(data)


def list_handmade_cases(base: Path, _: int) -> list[Case]:
    """List hostile and senseless configurations, tables, `dataset.json` files and sources."""
    return [*_list_yaml_cases(base), *_list_dataset_cases(), *_list_table_cases(base), *_list_source_cases()]


def _build_alias_bomb(key: str) -> str:
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for above, name in zip("abcdefgh", "bcdefghi", strict=True):
        text += f"{name}: &{name} [{','.join([f'*{above}'] * 9)}]\n"
    return text + f"{key}: *i\n"


def _list_yaml_cases(base: Path) -> list[Case]:
    contents: dict[str, str] = {
        "nothing": "",
        "a list": "[1, 2]",
        "a number": "5",
        "alias bomb, unknown key": _build_alias_bomb("zz"),
        "alias bomb in the encoder": _build_alias_bomb("encoder"),
        "alias bomb in preprocessing": _build_alias_bomb("preprocessing"),
        "a recursive value": "encoder: &x {name: *x}\n",
        "a recursive list": "preprocessing: &x [*x]\n",
        "deep lists": "preprocessing: " + "[" * 5000 + "]" * 5000,
        "deep objects": "encoder: " + "{a: " * 5000 + "1" + "}" * 5000,
        "20 MB": PRETRAIN_CONFIG + "name: " + "x" * 20_000_000,
        "100,000 keys": PRETRAIN_CONFIG + "".join(f"k{n}: 1\n" for n in range(100_000)),
        "a tag of Python": "!!python/object/apply:os.system ['touch tag-was-run']\n",
        "a date": PRETRAIN_CONFIG + "name: 2020-13-45\n",
        "two documents": PRETRAIN_CONFIG + "---\n" + PRETRAIN_CONFIG,
        "a key twice": PRETRAIN_CONFIG + "lr: 2.0\n",
        "merge keys": PRETRAIN_CONFIG + "x: &x {y: 1}\nz: {<<: *x}\n",
        "keys that are no text": "{1: 2, null: 3, [1]: 4}",
        "a name that leaves the folder": PRETRAIN_CONFIG + "name: ../../escape\n",
        "control characters": PRETRAIN_CONFIG + 'name: "\\e[31mx"\n',
        "UTF-16": PRETRAIN_CONFIG,
        "another task": FINETUNE_CONFIG,
    }
    encoded = {name: text.encode("utf-16" if name == "UTF-16" else "utf-8") for name, text in contents.items()}
    return [
        Case(
            name=f"pre.yaml: {name}",
            kind="YAML",
            prepare=partial(_prepare_runs, {"pre.yaml": data}, base),
            act=partial(run_command, *PRETRAIN),
            check=_expect_refused_files("tag-was-run"),
        )
        for name, data in encoded.items()
    ]


def _expect_refused_files(*absent: str) -> Check:
    """Build a check that the command fails and wrote none of some files."""

    def check(folder: Path, outcome: Outcome) -> Finding | None:
        """Search the files."""
        if any((folder / name).exists() for name in absent) or (folder.parent.parent / "escape").exists():
            return Finding(OTHER, "a file outside the output folder was written")
        return expect_refusal(1, 2, 4)(folder, outcome)

    return check


def _list_dataset_cases() -> list[Case]:
    pair = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    whole = {"labels": {"0": "background", "1": "one"}, "training": [pair]}
    contents: dict[str, bytes] = {
        name: json.dumps(content).encode()
        for name, content in {
            "99,999,999 labels": {**whole, "labels": {"0": "b", "99999999": "x"}},
            "3,000,000 labels": {**whole, "labels": {"0": "b", "3000000": "x"}},
            "a negative label": {**whole, "labels": {"0": "b", "-1": "x"}},
            "a label that is no number": {**whole, "labels": {"0": "b", "one": "x"}},
            "labels as a list": {**whole, "labels": ["b", "x"]},
            "label names twice": {**whole, "labels": {"0": "b", "1": "x", "2": "x"}},
            "label names that are numbers": {**whole, "labels": {"0": 0, "1": 1}},
            "an infinite label": {**whole, "labels": {"0": float("inf"), "1": "one"}},
            "training as an object": {**whole, "training": pair},
            "training as a number": {**whole, "training": 5},
            "a pair as a text": {**whole, "training": ["a"]},
            "a pair as a list": {**whole, "training": [["a", "b"]]},
            "an image as a number": {**whole, "training": [{**pair, "image": 5}]},
            "an image twice": {**whole, "training": [pair, pair]},
            "an image that is absent": {**whole, "training": [{**pair, "image": "./imagesTr/b.nii.gz"}]},
            "an image outside": {**whole, "training": [{**pair, "image": "../../../../../../etc/passwd"}]},
            "an absolute image": {**whole, "training": [{**pair, "image": "/etc/passwd"}]},
            "NUL in a path": {**whole, "training": [{**pair, "image": "a\0.nii.gz"}]},
            "half a surrogate in a path": {**whole, "training": [{**pair, "image": "\ud800.nii.gz"}]},
            "a long path": {**whole, "training": [{**pair, "image": "x" * 100_000}]},
        }.items()
    }
    contents |= {"deep": b"[" * 200_000, "no JSON": b"{", "not UTF-8": b'{"labels": "\xff"}', "nothing": b""}

    def prepare(data: bytes, folder: Path) -> None:
        """Write a pair and the file."""
        write_nifti(folder / "source/imagesTr/a.nii.gz", noise(4, 5, 6))
        write_nifti(folder / "source/labelsTr/a.nii.gz", (noise(4, 5, 6) % 2).astype(np.uint8))
        (folder / "source/dataset.json").write_bytes(data)

    return [
        Case(
            name=f"dataset.json: {name}",
            kind="dataset.json",
            prepare=partial(prepare, data),
            act=partial(run_command, "index", "source", "--modality", "mri", "--jobs", "1", "--out", "index"),
            check=_expect_no_foreign_image,
        )
        for name, data in contents.items()
    ]


def _expect_no_foreign_image(folder: Path, _: Outcome) -> Finding | None:
    for path in (folder / "index").glob("*.csv"):
        if "root:" in path.read_text(errors="replace"):
            return Finding(OTHER, "content of a file outside the source")
    return None


def _list_table_cases(base: Path) -> list[Case]:
    first = "image,label\n"
    contents: dict[str, bytes] = {
        "nothing": b"",
        "header only": first.encode(),
        "no column of images": b"x,y\n1,2\n",
        "a header twice": b"image,image,label\npicture00.png,picture01.png,a\n",
        "open quotes": (first + '"picture00.png,a\n').encode(),
        "a row cut": (first + "picture00.png\n").encode(),
        "a cell of 10 MB": (first + "picture00.png," + "x" * 10_000_000 + "\n").encode(),
        "NUL": (first + "picture00.png,a\0b\n").encode(),
        "not UTF-8": (first + "picture00.png,").encode() + b"\xff\xfe\n",
        "UTF-16": (first + "picture00.png,a\n").encode("utf-16"),
        "a formula": (first + "picture00.png,=cmd|' /C calc'!A0\n").encode(),
        "markup": (first + "picture00.png,<script>alert(1)</script>\n").encode(),
        "conflicting rows": (first + "picture00.png,a\npicture00.png,b\n").encode(),
        "an image outside": (first + "../../../etc/passwd,a\n").encode(),
        "100,000 classes": (first + "".join(f"x{n}.png,c{n}\n" for n in range(100_000))).encode(),
        "a mask as an image": b"image,mask\npicture00.png,picture01.png\n",
        "a mask outside": b"image,mask\npicture00.png,/etc/passwd\n",
        "infinite labels": (first + "".join(f"picture{n:02d}.png,inf\n" for n in range(60))).encode(),
    }
    return [
        Case(
            name=f"labels.csv: {name}",
            kind="CSV",
            prepare=partial(_prepare_runs, {"labels.csv": data}, base),
            act=partial(
                run_command,
                *("index", "png", "--modality", "xray", "--labels", "labels.csv", "--jobs", "1", "--out", "OUT"),
            ),
            check=_expect_no_foreign_image,
        )
        for name, data in contents.items()
    ]


def _list_source_cases() -> list[Case]:
    def fill(folder: Path) -> None:
        """Write one picture."""
        (folder / "source").mkdir()
        Image.fromarray(noise(28, 28).astype(np.uint8)).save(folder / "source/a.png")

    def link(target: str, folder: Path) -> None:
        """Link to a folder from the source."""
        fill(folder)
        (folder / "source/link").symlink_to(target)

    def nest(folder: Path) -> None:
        """Nest 400 folders."""
        fill(folder)
        earlier = Path.cwd()
        os.chdir(folder / "source")
        try:
            for _ in range(400):
                Path("d" * 50).mkdir()
                os.chdir("d" * 50)
        finally:
            os.chdir(earlier)

    def fill_with_files(folder: Path) -> None:
        """Write 5,000 empty files."""
        fill(folder)
        for number in range(5000):
            (folder / f"source/{number}.png").touch()

    index = ("index", "--modality", "xray", "--jobs", "1", "--out", "index")
    sources: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
        "a link to the root": (partial(link, "/"), (*index, "source")),
        "a link to itself": (partial(link, "link"), (*index, "source")),
        "a link to its parent": (partial(link, ".."), (*index, "source")),
        "a link to /dev": (partial(link, "/dev"), (*index, "source")),
        "400 folders in one another": (nest, (*index, "source")),
        "5,000 empty files": (fill_with_files, (*index, "source")),
        "/dev": (fill, (*index, "/dev")),
        "/proc/self": (fill, (*index, "/proc/self")),
        "/dev/zero": (fill, (*index, "/dev/zero")),
        "no folder": (fill, (*index, "nosuch")),
        "the output folder": (fill, ("index", "source", "--modality", "xray", "--out", "source")),
        "an empty name": (fill, (*index, "")),
    }
    return [
        Case(
            name=f"source: {name}",
            kind="source",
            prepare=prepare,
            act=partial(run_command, *command),
            check=_keep_source,
        )
        for name, (prepare, command) in sources.items()
    ]


def _keep_source(folder: Path, _: Outcome) -> Finding | None:
    return None if (folder / "source/a.png").is_file() else Finding(OTHER, "the source was changed")
