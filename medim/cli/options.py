"""Options that several commands take, each with its help text said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Images, an index, a store or a fetched set. Default for MRI: the built-in cohort."),
]
LabelsOption = Annotated[
    Path | None, typer.Option("--labels", help="CSV with columns image or subject, and label or mask.")
]
SubjectsOption = Annotated[Path | None, typer.Option("--subjects", help="CSV with columns image,subject.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a config key: key=value. May be repeated.")
]
MAX_SEED = 2**32 - 1  # what numpy and torch both take
SeedOption = Annotated[int, typer.Option("--seed", help="Fixes everything that is drawn.", min=0, max=MAX_SEED)]
SplitSeedOption = Annotated[
    int, typer.Option("--split-seed", help="Seed of the split by subject.", min=0, max=MAX_SEED)
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Empty --out first.")]
FailOnContaminationOption = Annotated[
    bool,
    typer.Option(
        "--fail-on-contamination", help="Fail if a test image or subject was in the training data of the weights."
    ),
]
AcceleratorOption = Annotated[str, typer.Option("--accelerator", help="auto, cpu, cuda, mps.")]
DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--devices", help="Processes a node, one a device. Default: what torchrun or SLURM started, or 1.", min=1
    ),
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", help="Machines. Default: as torchrun or SLURM say, or 1.", min=1)
]
PrecisionOption = Annotated[
    str | None, typer.Option("--precision", help="32-true, bf16-mixed or 16-mixed. Default: the config's.")
]
ConfigOption = Annotated[
    str | None, typer.Option("--config", help="A preset's name (medim config list) or a YAML file.")
]
InputsArgument = Annotated[list[Path], typer.Argument(help="NIfTI, DICOM files or folders, PNG, npz.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where to write.")]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--public-key", metavar="FILE", help="Ed25519 public key (PEM). Exit code 3 if it did not sign the package."
    ),
]
