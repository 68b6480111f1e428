"""Options shared by several commands, and their checks."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from medim.config import suggest_name
from medim.types import Modality, UsageError, UserError

DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="PATH",
        help="Images, an index, a store or a fetched public set. Default for MRI: the simulated cohort.",
    ),
]
LabelsOption = Annotated[
    Path | None, typer.Option("--labels", metavar="FILE", help="CSV with columns image or subject, and label or mask.")
]
SubjectsOption = Annotated[
    Path | None, typer.Option("--subjects", metavar="FILE", help="CSV with columns image,subject.")
]
ImageColumnOption = Annotated[
    str | None, typer.Option("--image-column", metavar="NAME", help="Column of images in the table of labels.")
]
LabelColumnOption = Annotated[
    str | None, typer.Option("--label-column", metavar="NAME", help="Column of labels in the table of labels.")
]
SubjectColumnOption = Annotated[
    str | None, typer.Option("--subject-column", metavar="NAME", help="Column of subjects in the table of labels.")
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help='Use only images of which the columns of the index satisfy this, such as "sequence=T1w and spacing_z<3".',
    ),
]
KeepNamesOption = Annotated[
    bool,
    typer.Option(
        "--keep-names", help="Keep the names of files and folders that may identify people. Only for public data."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key. May be repeated.")
]
MODALITY_HELP = (
    "Modality of the images to use; images of other modalities are rejected. mri: 3D (DICOM MR). xray: 2D (DICOM CR, "
    "DX, RG, MG, IO, PX, and single images of RF and XA)."
)
ModalityOption = Annotated[
    Modality | None,
    typer.Option(
        "--modality",
        help=f"{MODALITY_HELP} Default: that of --config, of --encoder, or of the index, store or public set in "
        "--data.",
    ),
]
PreprocessingJobsOption = Annotated[
    int, typer.Option("--jobs", metavar="N", help="Number of processes that preprocess images.", min=1)
]
MAX_SEED = 2**32 - 1  # what numpy and torch both take
SeedOption = Annotated[
    int,
    typer.Option("--seed", metavar="N", help="Random seed of weights, batches and augmentation.", min=0, max=MAX_SEED),
]
SplitSeedOption = Annotated[
    int, typer.Option("--split-seed", metavar="N", help="Random seed of the split by subject.", min=0, max=MAX_SEED)
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue a stopped command in --out.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the content of --out.")]
FailOnContaminationOption = Annotated[
    bool,
    typer.Option(
        "--fail-on-contamination", help="Fail if a test image or subject was in the training data of the weights."
    ),
]
DEVICES = ("auto", "cpu", "cuda", "gpu", "mps")
_NUMBERED_DEVICE = re.compile(r"(?:cuda|gpu):(\d{1,3})")


def parse_device(text: str) -> str:
    """Parse `--device`; with `cuda:N`, the other GPUs are hidden from this command.

    Raises:
        BadParameter: there is no such kind of device.
    """
    name = text.strip().lower()
    if match := _NUMBERED_DEVICE.fullmatch(name):
        visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
        number = int(match[1])
        if visible and number >= len(visible):
            raise typer.BadParameter(
                f"CUDA_VISIBLE_DEVICES has {len(visible)} GPUs, so expected cuda:0 to cuda:{len(visible) - 1}, "
                f"got {text!r}."
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number] if visible else match[1]
        return "cuda"
    if name not in DEVICES:
        hint = suggest_name(name, DEVICES)
        raise typer.BadParameter(f"expected auto, cpu, cuda, cuda:N (GPU number N) or mps, got {text!r}.{hint}")
    return name


DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="[auto|cpu|cuda|cuda:N|mps]",
        help="Device; cuda:1 is the second GPU. Packages run on the CPU.",
        parser=parse_device,
    ),
]
DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--devices",
        metavar="N",
        help="Number of processes per node, one per device. Default: as started by torchrun or SLURM, else 1.",
        min=1,
    ),
]
NodesOption = Annotated[
    int | None,
    typer.Option(
        "--nodes", metavar="N", help="Number of nodes. Default: as started by torchrun or SLURM, else 1.", min=1
    ),
]
NoOodOption = Annotated[
    bool,
    typer.Option(
        "--no-ood", help="Fit no out-of-distribution detector, to save time in a trial. A package needs one to warn."
    ),
]
PrecisionOption = Annotated[
    Literal["32-true", "bf16-mixed", "16-mixed"] | None,
    typer.Option("--precision", help="Number format of the computation. Default: from the configuration."),
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="NAME|FILE", help="Name of a preset (see medim config list) or a YAML file."),
]
InputsArgument = Annotated[list[Path], typer.Argument(help="NIfTI, DICOM files or folders, PNG, npz.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Output folder.")]
PublicKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--public-key", metavar="FILE", help="Ed25519 public key (PEM). Exit code 3 if it did not sign the package."
    ),
]


def require_modality(data: Path | None) -> Modality:
    """Read the modality that `--data` records.

    Raises:
        UsageError: the images have no index, so `--modality` is required.
    """
    from medim.data.source import find_modality

    modality = find_modality(data)
    if modality is None:
        raise UsageError("--modality: mri or xray is required, because --data is not an index, store or public set.")
    return modality


def check_modality(modality: Modality, option: Modality | None, config: str | None) -> None:
    """Check that `--modality` is that of the configuration.

    Raises:
        UserError: they differ.
    """
    if option not in (None, modality):
        raise UserError(f"--config {config}: this configuration is for {modality}, but --modality is {option}.")
