"""Commands that write files, with small inputs of their own."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tests.data.public_server import path_of, serving
from tests.identity_harness import build_configs, write_nifti_tree, write_tables
from tests.kill_harness.processes import ForkServer

SET_URL = "https://example.org/harness.zip"
SETUP = f"""
from medim.data.public.catalog import PUBLIC_SETS, PublicFile, PublicSet
file = PublicFile(url={SET_URL!r}, name="harness", archive=True)
PUBLIC_SETS["harness"] = PublicSet(
    modality="mri", title="made up", licence="CC0", citation="nobody", sums=None, files=(file,)
)
"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A command that writes to `out` in its working folder.

    Attributes:
        words: the command line; `{inputs}` is the folder of the inputs.
        default_count: number of signals in the full table.
        resumable: whether it has `--resume`.
        replaceable: whether it has `--overwrite`.
        reader: command that reads the result; empty for none.
        is_direct: whether it writes to a new output folder itself instead of a subfolder.
        may_repeat: whether the same command continues without an option.
        other_words: words to append for an earlier result with other content.
        outputs: files and folders of the result.
    """

    words: Sequence[str]
    default_count: int = 10
    resumable: bool = False
    replaceable: bool = True
    reader: Sequence[str] = ()
    is_direct: bool = False
    may_repeat: bool = False
    other_words: Sequence[str] = ()
    outputs: Sequence[str] = ("out",)

    def build_words(self, inputs: Path, *more: str) -> list[str]:
        """Build the command line."""
        return [word.replace("{inputs}", str(inputs)) for word in (*self.words, *more)]


DATA = ["{inputs}/Osterwind_export"]
TABLES = ["--labels", "{inputs}/labels.csv", "--subjects", "{inputs}/subjects.csv"]
TRAINING = ["--config", "{inputs}/finetune.yaml", "--data", *DATA, *TABLES]
PRETRAIN = ["pretrain", "--modality", "mri", "--data", *DATA, "--config", "{inputs}/pretrain.yaml", "--out", "out"]
STUDY = [
    *("study", "--task", "classification", "--encoder", "dim={inputs}/run", *TRAINING, "--labelled", "4"),
    *("--seeds", "1", "--lr-multipliers", "fixed", "--out", "out"),
]
INDEX = ["index", *DATA, "--modality", "mri", *TABLES, "--no-cache", "--out", "out"]
PREPROCESS = ["preprocess", *DATA, "--modality", "mri", "--config", "{inputs}/pretrain.yaml", "--out", "out"]
REPORT = ["report", "out"]
TASKS: dict[str, Task] = {
    "index": Task(words=[*INDEX, "--jobs", "1"], reader=REPORT, other_words=["--keep-names"]),
    "index, 2 processes": Task(words=[*INDEX, "--jobs", "2"], default_count=6, reader=REPORT),
    "preprocess": Task(words=PREPROCESS, replaceable=False, may_repeat=True, reader=REPORT, is_direct=True),
    "preprocess, 2 processes": Task(
        words=[*PREPROCESS, "--jobs", "2"],
        default_count=6,
        replaceable=False,
        may_repeat=True,
        reader=REPORT,
        is_direct=True,
    ),
    "example": Task(
        words=["example", "--subjects", "2", "--spacing", "6", "--format", "nifti,dicom", "--out", "out"],
        reader=["index", "out", "--modality", "mri", "--out", "read"],
        other_words=["--seed", "1"],
    ),
    "fetch": Task(
        words=["fetch", "harness", "--out", "out"],
        default_count=48,
        replaceable=False,
        may_repeat=True,
        is_direct=True,
    ),
    "predict": Task(words=["predict", "{inputs}/package", *DATA, "--out", "out"], default_count=20, resumable=True),
    "embed": Task(
        words=["embed", "{inputs}/run", *DATA, "--out", "out.csv", "--mi-map-dir", "out"],
        resumable=True,
        outputs=("out.csv", "out"),
    ),
    "evaluate": Task(
        words=[
            *("evaluate", "{inputs}/model", "--data", *DATA, *TABLES, "--split", "all", "--out", "out"),
            "--include-training-subjects",
        ],
        reader=REPORT,
    ),
    "probe": Task(words=["probe", "{inputs}/run", "--data", *DATA, *TABLES, "--seeds", "1", "--out", "out"]),
    "pretrain": Task(
        words=PRETRAIN,
        default_count=67,
        resumable=True,
        reader=["export", "out", "--out", "read"],
        is_direct=True,
        other_words=["--seed", "1"],
    ),
    "pretrain, 1 loader": Task(
        words=[*PRETRAIN, "--set", "workers=1"],
        default_count=6,
        resumable=True,
        reader=["export", "out", "--out", "read"],
        is_direct=True,
    ),
    "finetune": Task(
        words=["finetune", "--task", "classification", "--encoder", "{inputs}/run", *TRAINING, "--out", "out"],
        default_count=20,
        resumable=True,
        reader=["export", "out", "--out", "read"],
        is_direct=True,
        other_words=["--seed", "1"],
    ),
    "export": Task(
        words=["export", "{inputs}/run", "--out", "out"], default_count=7, reader=["verify", "out"], other_words=[]
    ),
    "study": Task(words=STUDY, default_count=10, resumable=True, reader=REPORT, is_direct=True),
    "study, 2 processes": Task(
        words=[*STUDY, "--jobs", "2"], default_count=3, resumable=True, reader=REPORT, is_direct=True
    ),
}


def write_inputs(folder: Path, server: ForkServer, *, steps: int, with_packages: bool) -> None:
    """Write images, tables, configurations and an encoder; with packages, also a model and the packages of both.

    Args:
        folder: a new folder.
        server: starts the commands that train and export.
        steps: steps of each training.
        with_packages: whether to write the inputs of all tasks instead of those that read no model and no package.
    """
    tree = write_nifti_tree(folder / "Osterwind_export")
    write_tables(folder, tree)
    for name, text in build_configs().items():
        config = {**yaml.safe_load(text), "max_steps": steps, "checkpoint_every_steps": max(1, steps // 8)}
        if name == "finetune.yaml":  # a study selects these steps by the speed of the machine
            config["eval_steps"] = [steps // 2]
        (folder / name).write_text(yaml.safe_dump(config))
    names = {"pretrain": "run", **({"finetune": "model"} if with_packages else {})}
    commands = [TASKS[name].build_words(folder, "--out", str(folder / target)) for name, target in names.items()]
    if with_packages:
        commands += [["export", str(folder / run), "--out", str(folder / package)] for run, package in PACKAGES]
    for words in commands:
        run = server.run(words)
        if run.exit_code:
            raise RuntimeError(f"{words}: {run.text}")


PACKAGES = [("model", "package"), ("run", "encoder")]


@contextmanager
def publish_set(n_files: int = 200) -> Iterator[str]:
    """Serve the archive of `medim fetch harness`; yields the address for MEDIM_MIRROR."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for number in range(n_files):
            data = np.random.default_rng(number).bytes(20_000)
            archive.writestr(zipfile.ZipInfo(f"images/{number}.bin"), data)
    with serving() as publisher:
        publisher.files[path_of(SET_URL)] = content.getvalue()
        yield publisher.url
