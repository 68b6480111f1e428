"""Plant identities into trees of images, run commands on them, and search every byte that these write for a trace.

`python -m tests.identity_harness` prints the hits of each tree and command as a Markdown table.
"""

from __future__ import annotations

import base64
import gc
import gzip
import io
import os
import re
import sqlite3
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from medim.cli import app
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from tests.data.synthetic import noise, write_nifti, write_series
from tests.specs import make_spec

PLACE = "Kestrelheim_Zyxwvuta"  # the folder above all trees: an institution and a person
TRACES = (  # of name, ID, accession number, institution, address, dates of birth, phone, physician, user
    "zyxwvuta", "quillon", "qx7731904", "acc5550199", "kestrelheim", "brimblewick", "19431117", "17-11-1943",
    "1943-11-17", "5550147123", "morvannis", "osterwind",
)  # fmt: skip
N_PATIENTS = 14


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, and whether it is expected to fail."""

    words: Sequence[str]
    fails: bool = False

    @property
    def name(self) -> str:
        """Name of the command with its options that have no value."""
        flags = [word for word in self.words if word in ("--debug", "--keep-names")]
        return " ".join([self.words[0], *flags, *(["(fails)"] if self.fails else [])])


@dataclass(kw_only=True)
class Outcome:
    """Traces in the output of a command.

    Attributes:
        command: the command.
        exit_code: its exit code.
        hits: file (or `output`) and trace.
        text: standard output and standard error.
    """

    command: Command
    exit_code: int
    hits: set[str] = field(default_factory=set)
    text: str = ""


def patient(number: int) -> str:
    """Family and given name of a patient."""
    return f"Zyxwvuta{chr(65 + number)} Quillon"


def write_dicom_tree(root: Path, *, headers: bool) -> Path:
    """Write a series per patient in a folder of the name; without `headers`, these are de-identified."""
    for number in range(N_PATIENTS):
        name = patient(number)
        tags: dict[str, object] = {"PatientName": f"ANON^{number}", "PatientID": f"S{number}"}
        if headers:
            tags = {"PatientName": name.replace(" ", "^"), "PatientID": f"QX7731904{number}"}
            tags |= {"AccessionNumber": "ACC5550199", "InstitutionName": "Kestrelheim", "PatientBirthDate": "19431117"}
            tags |= {"InstitutionAddress": "Brimblewick 7", "PatientTelephoneNumbers": "5550147123"}
            tags |= {"ReferringPhysicianName": "Morvannis^Ada", "OperatorsName": "Osterwind"}
        folder = root / f"{name.replace(' ', '_')}_17-11-1943" / "T1"
        write_series(folder, noise(8, 8, 8, seed=number), gap=1.0, SeriesInstanceUID=f"1.2.3.{number}", **tags)
    return root


def write_nifti_tree(root: Path) -> Path:
    """Write two sequences per patient; folder and header contain the name, the file name ID and birth date."""
    for number in range(N_PATIENTS):
        folder = root / f"{patient(number).replace(' ', '-')}"
        for sequence in ("t1", "t2"):
            path = folder / f"QX7731904{number}_1943-11-17_{sequence}.nii.gz"
            write_nifti(path, noise(8, 8, 8, seed=number), descrip=f"{patient(number)} NIfTI", aux_file="ACC5550199")
    return root


def write_bids_tree(root: Path) -> Path:
    """Write a BIDS tree whose entities are names and dates instead of codes."""
    (root / "sub").parent.mkdir(parents=True)
    (root / "dataset_description.json").write_text('{"Name": "Kestrelheim", "BIDSVersion": "1.8.0"}')
    rows = ["participant_id\taddress\tdiagnosis"]
    for number in range(N_PATIENTS):
        entity = f"sub-{patient(number).replace(' ', '')}"
        write_nifti(root / entity / "ses-19431117" / "anat" / f"{entity}_ses-19431117_T1w.nii.gz", noise(8, 8, 8))
        rows.append(f"{entity}\tBrimblewick 7\tno")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    return root


def write_png_tree(root: Path, *, images: int) -> Path:
    """Write pictures in a folder per patient, with the name in a text chunk. Ten or more look like classes."""
    for number in range(N_PATIENTS):
        folder = root / patient(number).replace(" ", "_")
        folder.mkdir(parents=True)
        for view in range(images):
            info = PngImagePlugin.PngInfo()
            info.add_text("Author", f"{patient(number)}, Morvannis")
            pixels = noise(8, 8, seed=100 * number + view).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"QX7731904{number}_{view}.png", pnginfo=info)
    return root


def write_archive_tree(root: Path) -> Path:
    """Write an archive in MedMNIST's layout, named after a patient."""
    root.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", 14), ("val", 12), ("test", 1)):
        images = np.random.default_rng(count).integers(0, 255, (count, 8, 8), np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_labels": np.arange(count)[:, None] % 2}
    np.savez(root / "Quillon_chest.npz", **arrays)
    return root


def write_tables(place: Path, tree: Path) -> None:
    """Write labels, subjects, groups and a table without header next to a tree."""
    files = sorted(path for path in tree.rglob("*") if path.is_file() and ".nii" in path.name)
    relative = [path.relative_to(tree).as_posix() for path in files]
    person = [path.parent.name for path in files]
    labels = {name: "ab"[number % 2] for number, name in enumerate(dict.fromkeys(person))}
    rows = list(zip(relative, person, strict=True))
    splits = {name: "train" if number < len(labels) - 10 else "val" for number, name in enumerate(labels)}
    cells = (f"{file},{labels[name]},{splits[name]}\n" for file, name in rows)
    (place / "labels.csv").write_text("image,label,split\n" + "".join(cells))
    (place / "subjects.csv").write_text("image,subject\n" + "".join(f"{file},{name}\n" for file, name in rows))
    groups = "".join(f"{file},{'Morvannis' if labels[name] == 'a' else 'Osterwind'}\n" for file, name in rows)
    (place / "groups.csv").write_text("image,physician\n" + groups)
    (place / "headless.csv").write_text("".join(f"{file},{name}\n" for file, name in rows))


def write_encoder(folder: Path, *, dims: int) -> Path:
    """Write an untrained encoder as a run."""
    spec = {"kind": "encoder", "modality": "mri" if dims == 3 else "xray", "spatial_dims": dims, "in_channels": 1}
    spec |= {"input_shape": [8] * dims, "preprocessing": [], "inference": {"mode": "whole"}}
    spec |= {"encoder": {"name": "unet", "channels": [2, 4]}}
    save_model(folder / "encoder", "encoder", build_encoder(make_spec(spec)), make_spec(spec))
    return folder


def list_texts(path: Path) -> Iterator[bytes]:
    """Yield the name and the bytes of a file, and the content that is packed in them."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        if path.name.endswith(("-shm", "-wal")):  # SQLite moved its pages into the database
            return
        raise
    yield path.as_posix().encode()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (name.encode() + archive.read(name) for name in archive.namelist())
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            yield repr([arrays[name].tolist() for name in arrays.files if arrays[name].dtype.kind in "US"]).encode()
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        yield repr((table.to_pylist(), table.schema.metadata)).encode()
    if data[:15] == b"SQLite format 3":
        # Immutable: opening it otherwise removes its files -wal and -shm, which are read as they are.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?immutable=1", uri=True)) as database:
            yield "\n".join(database.iterdump()).encode()
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        with Image.open(path) as picture:
            yield repr(picture.info).encode()
    if path.suffix == ".b2nd":
        import blosc2

        array = blosc2.open(str(path), mode="r")  # its metadata need the array
        yield repr(dict(array.schunk.vlmeta.getall())).encode()
    if path.suffix in {".html", ".json"}:
        for match in re.finditer(rb"base64,([A-Za-z0-9+/=]+)", data):
            yield base64.b64decode(match[1])


def find_traces(text: bytes) -> set[str]:
    """Find the traces in bytes, in any case."""
    lowered = text.lower()
    return {trace for trace in TRACES if trace.encode() in lowered}


def run_commands(commands: Sequence[Command], out: Path) -> list[Outcome]:
    """Run commands in a folder, and search the output of each and all files that it has written or changed."""
    outcomes, states = [], dict[Path, tuple[int, int]]()
    for command in commands:
        words = list(command.words)
        with patch.object(sys, "argv", ["medim", *words]):
            result = CliRunner().invoke(app, words)
        text = result.output + "".join(map(str, [result.exception] if result.exception else []))
        outcome = Outcome(command=command, exit_code=result.exit_code, text=text)
        outcome.hits |= {f"output: {trace}" for trace in find_traces(text.encode())}
        gc.collect()  # closes databases, whose files beside them vanish then
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            state = path.stat().st_size, path.stat().st_mtime_ns
            if states.get(path) != state:
                states[path] = state
                relative = path.relative_to(out)
                traces = set().union(*(find_traces(t.replace(str(out).encode(), b"")) for t in list_texts(path)))
                outcome.hits |= {f"{relative}: {trace}" for trace in traces}
        outcomes.append(outcome)
    return outcomes


def list_volume_commands(place: Path, tree: Path, run: Path) -> list[Command]:
    """List the commands on a tree of volumes with tables next to it."""
    data, labels, subjects = str(tree), str(place / "labels.csv"), str(place / "subjects.csv")
    tables = ["--labels", labels, "--subjects", subjects]
    small = ["--config", "finetune.yaml"]
    lines = [
        ["index", data, "--modality", "mri", *tables, "--out", "index"],
        ["preprocess", "index", "--modality", "mri", "--config", "pretrain.yaml", "--out", "store"],
        ["pretrain", "--modality", "mri", "--data", data, "--config", "pretrain.yaml", "--out", "run"],
        ["finetune", "--task", "classification", "--data", data, *tables, "--encoder", "run", *small, "--out", "model"],
        ["evaluate", "model", "--data", data, *tables, "--split", "all", "--out", "measured",
         "--include-training-subjects"],
        ["probe", "run", "--data", data, *tables, "--seeds", "1", "--out", "probed"],
        ["study", "--task", "classification", "--encoder", "dim=run", "--data", data, *tables, *small, "--labelled",
         "4", "--where", "subject!=*Quillon*", "--seeds", "1", "--lr-multipliers", "fixed",
         "--groups", str(place / "groups.csv"), "--out", "study"],
        ["export", "model", "--out", "package", "--register", "classifier"],
        ["predict", "package", data, "--out", "predicted"],
        ["embed", "run", data, "--out", "features.npz", "--mi-map-dir", "maps"],
        ["embed", "run", data, "--out", "features.csv"],
        *(["report", folder] for folder in ("index", "store", "run", "model", "measured", "study")),
    ]  # fmt: skip
    return [*(Command(words=words) for words in lines), *list_failures(place, tree, run, "mri"), *(
        Command(words=words, fails=True)
        for words in (
            ["evaluate", "model", "--data", data, "--out", "unlabelled"],
            ["evaluate", "model", "--data", data, *tables, "--split", "test", "--out", "untested", "--debug"],
            ["probe", "run", "--data", data, "--out", "unprobed"],
            ["finetune", "--task", "classification", "--data", data, "--encoder", "run", *small, "--out", "untuned"],
            ["predict", "package", str(place / "broken"), "--out", "rejected"],
        )
    )]  # fmt: skip


def list_failures(place: Path, tree: Path, run: Path, modality: str) -> list[Command]:
    """List commands that fail on any tree, with `--debug`, whose output contains the message, too."""
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken" / "Zyxwvuta.nii.gz").write_bytes(b"junk")
    (place / "described").mkdir(exist_ok=True)
    (place / "described" / "dataset.json").write_text('{"training": [["Quillon"]]}')
    other = {"mri": "xray", "xray": "mri"}[modality]
    index = ["index", str(tree), "--modality", modality, "--out"]
    lines = [
        ["index", str(tree), "--modality", other, "--out", "other"],
        ["index", str(place / "broken"), "--modality", modality, "--out", "broken"],
        ["index", str(place / "described"), "--modality", modality, "--out", "described"],
        ["index", str(place / "Quillon_absent"), "--modality", modality, "--out", "absent"],
        [*index, "headless", "--labels", str(place / "headless.csv")],
        [*index, "unlabelled", "--labels", str(place / "Quillon.csv")],
        [*index, "folder", "--subjects", str(place)],
        ["embed", str(run), str(place / "broken"), "--out", "broken.csv"],
    ]
    return [Command(words=[*words, "--debug"], fails=True) for words in lines]


def list_picture_commands(place: Path, tree: Path, run: Path) -> list[Command]:
    """List the commands on a tree of pictures."""
    data = str(tree)
    lines = [
        ["index", data, "--modality", "xray", "--out", "index"],
        ["embed", str(run), data, "--out", "features.parquet"],
        ["embed", str(run), data, "--out", "features.npz"],
        ["report", "index"],
    ]
    return [*(Command(words=words) for words in lines), *list_failures(place, tree, run, "xray")]


def list_index_commands(place: Path, tree: Path, run: Path) -> list[Command]:
    """List the commands on a tree of volumes without tables."""
    data = str(tree)
    lines = [
        ["index", data, "--modality", "mri", "--out", "index"],
        ["embed", str(run), data, "--out", "features.parquet"],
        ["report", "index"],
    ]
    return [*(Command(words=words) for words in lines), *list_failures(place, tree, run, "mri")]


def run_trees(folder: Path, configs: Mapping[str, str], trees: Sequence[str] = ()) -> dict[str, list[Outcome]]:
    """Write every tree and run its commands in a folder of its own.

    Args:
        folder: an empty folder.
        configs: content of `pretrain.yaml` and `finetune.yaml`.
        trees: names of the trees; empty for all.
    """
    runs = {dims: write_encoder(folder / f"encoder{dims}", dims=dims) for dims in (2, 3)}
    writers = {
        "NIfTI": (write_nifti_tree, list_volume_commands, 3),
        "BIDS": (write_bids_tree, list_index_commands, 3),
        "PNG": (lambda root: write_png_tree(root, images=2), list_picture_commands, 2),
        "PNG, many images": (lambda root: write_png_tree(root, images=10), list_picture_commands, 2),
        "npz": (write_archive_tree, list_picture_commands, 2),
        "DICOM": (lambda root: write_dicom_tree(root, headers=True), list_index_commands, 3),
        "DICOM, de-identified": (lambda root: write_dicom_tree(root, headers=False), list_index_commands, 3),
    }
    outcomes = {}
    for number, (name, (write_tree, list_commands, dims)) in enumerate(writers.items()):
        if trees and name not in trees:
            continue
        place, out = folder / f"in{number}" / PLACE, folder / f"out{number}"
        tree = write_tree(place / "Osterwind_export")
        if name == "NIfTI":
            write_tables(place, tree)
        else:
            (place / "headless.csv").write_text("Quillon,Zyxwvuta\n")
        out.mkdir()
        for file, content in configs.items():
            (out / file).write_text(content)
        settings = {"MEDIM_CACHE": str(out / "cache"), "MLFLOW_TRACKING_URI": f"sqlite:///{out / 'mlflow.db'}"}
        previous = Path.cwd()
        try:
            os.chdir(out)
            with patch.dict(os.environ, settings):
                outcomes[name] = run_commands(list_commands(place, tree, runs[dims]), out)
        finally:
            os.chdir(previous)
    return outcomes


def build_configs() -> dict[str, str]:
    """Build the smallest configurations that train on the volumes."""
    import yaml

    common = {
        "modality": "mri",
        "preprocessing": [{"op": "ras"}, {"op": "normalise", "method": "zscore"}],
        "views": {"shape": [8, 8, 8], "augmentations": []},
        "encoder": {"name": "unet", "channels": [2, 4], "summary_channels": 4},
        "max_steps": 2,
        "batch_size": 4,
        "lr": 0.001,
        "checkpoint_every_steps": 2,
    }
    objective = {"name": "local_dim", "estimator": "infonce", "critic": {"name": "encode_and_dot", "width": 4}}
    finetune = {"task": "classification", "decoder": None, "head": {"name": "classification"}}
    finetune |= {"inference": {"mode": "whole", "multiple_of": 2}}
    return {
        "pretrain.yaml": yaml.safe_dump({**common, "objectives": [objective]}),
        "finetune.yaml": yaml.safe_dump({**common, **finetune, "batch_size": 2}),
    }


def main() -> None:
    """Print the hits of every tree and command."""
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CONFIG_HOME"] = f"{name}/config"
        outcomes = run_trees(Path(name), build_configs(), sys.argv[1:])
    print("| tree | command | exit code | hits | examples |\n| --- | --- | --- | --- | --- |")
    for tree, rows in outcomes.items():
        for row in rows:
            examples = "; ".join(sorted(row.hits)[:3])
            print(f"| {tree} | {row.command.name} | {row.exit_code} | {len(row.hits)} | {examples} |")
            if bool(row.exit_code) != row.command.fails:
                print(f"unexpected exit code of {' '.join(row.command.words)}: {row.text[-600:]}", file=sys.stderr)


if __name__ == "__main__":
    main()
