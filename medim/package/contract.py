"""`medim.json`: what a package promises. Data only: no expressions, no code, nothing from patients."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError, model_validator

from medim.config import validate_section
from medim.data.preprocessing.steps import check_steps
from medim.files import json_sha256
from medim.inference.network import INFERENCES, ModelKind
from medim.inference.ood import LimitMethod
from medim.package.dicom_rules import DicomRules
from medim.package.label_codes import LabelCode as LabelCodes
from medim.package.schema import StrictModel as _Strict
from medim.types import Modality, Step, UserError

SCHEMA_VERSION = 1
RESEARCH_ONLY = "Research use only: not a medical device, not for diagnosis, treatment or any decision about a patient."
NOT_REPORTED = "not reported"
WEIGHTS, GRAPH = "models/model.safetensors", "models/model.onnx"
REPORT, GOLDEN = "parity/report.json", "parity/golden.npz"
STATISTICS = "models/reference.npz"
SCORE_MAP, SCORE_MAP_GOLDEN = "models/score_map.onnx", "parity/score_map.npz"

PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}$")]
ClassName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
Sha256Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PackageError(UserError):
    """A package that is not what it says: changed, incomplete, or of another schema."""

    exit_code = 3


class Symbol(_Strict):
    """A side that may vary: `minimum <= n <= maximum`, a multiple of `multiple_of`."""

    minimum: PositiveInt = 1
    maximum: PositiveInt | None = None
    multiple_of: PositiveInt = 1


class TensorSpec(_Strict):
    """An input or output of the network; a side is a number or the name of a symbol (or `symbol/stride`).

    Where convolutions are not padded, a map has fewer cells than that, `stride` voxels apart.
    """

    name: str
    dtype: Literal["float32"] = "float32"
    shape: tuple[int | str, ...]


class Signature(_Strict):
    """What goes into the network and what comes out. The first output is the answer."""

    inputs: tuple[TensorSpec]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    symbols: dict[str, Symbol]

    @model_validator(mode="after")
    def _check_sides(self) -> Signature:
        shape = self.inputs[0].shape
        if len(shape) not in (4, 5) or not isinstance(shape[1], int) or min(len(o.shape) for o in self.outputs) < 2:
            raise ValueError("expected an input (batch, channels, two or three sides), outputs of two sides or more")
        if unknown_sides := {side for side in shape if isinstance(side, str)} - self.symbols.keys():
            raise ValueError(f"no rule for the sides {sorted(unknown_sides)}")
        return self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise UserError where an input of `shape` is outside the contract."""
        expected = self.inputs[0].shape
        fits = len(shape) == len(expected) and all(map(self._fits_side, shape, expected))
        if not fits:
            rules = {name: symbol.model_dump(exclude_none=True) for name, symbol in self.symbols.items()}
            raise UserError(
                f"network: expected an input {list(expected)} with {rules}, "
                f"got {list(shape)}. Preprocess or pad it to that."
            )

    def _fits_side(self, side: int, expected: int | str) -> bool:
        if isinstance(expected, int):
            return side == expected
        symbol = self.symbols[expected]
        return symbol.minimum <= side <= (symbol.maximum or side) and side % symbol.multiple_of == 0


class ScoreMapSpec(_Strict):
    """An encoder's mutual-information map: image in, the critic's score of every voxel out."""

    signature: Signature
    critic: dict[str, Any] = Field(description="the objective that trained it, and the sha256 of its weights")


class OODStatistics(_Strict):
    """What the statistics in `models/reference.npz` were made of."""

    sha256: Sha256Digest = Field(description="of that file")
    images: PositiveInt
    subjects: PositiveInt
    held_out_images: PositiveInt
    held_out_subjects: PositiveInt
    method: LimitMethod = Field(description="how the limits were set on the held-out subjects")
    false_alarms: float = Field(description="part of the images of fresh subjects that get the flag")

    def __str__(self) -> str:
        """A short sentence for a card."""
        return (
            f"statistics of {self.images} images of {self.subjects} subjects; limits from {self.held_out_images} of "
            f"{self.held_out_subjects} others ({self.method}), {self.false_alarms:.0%} false alarms"
        )


class Postprocess(_Strict):
    """How an answer is made of the first output; the vocabulary is closed."""

    activation: Literal["none", "softmax", "sigmoid"]
    invert: Literal["none", "resample logits (order 1), then argmax"]


POSTPROCESS: dict[ModelKind, Postprocess] = {
    "encoder": Postprocess(activation="none", invert="none"),
    "classifier": Postprocess(activation="softmax", invert="none"),
    "multi_label_classifier": Postprocess(activation="sigmoid", invert="none"),
    "segmenter": Postprocess(activation="none", invert="resample logits (order 1), then argmax"),
}


class Contract(_Strict):
    """The content of `medim.json`."""

    schema_version: Literal[1] = 1
    name: PackageName
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+([-+][0-9A-Za-z.-]+)?$")]
    kind: ModelKind
    modality: Modality
    intended_use: str = NOT_REPORTED
    not_for: str = RESEARCH_ONLY
    preprocess: tuple[Step, ...]
    preprocess_sha256: Sha256Digest
    inference: Step
    postprocess: Postprocess
    signature: Signature
    score_map: ScoreMapSpec | None = Field(
        default=None, description="of an encoder that was trained with a local critic"
    )
    reference: OODStatistics | None = Field(
        default=None, description="of the out-of-distribution guard; none in older runs"
    )
    classes: tuple[ClassName, ...] = Field(default=(), max_length=255, description="a segmenter's without background")
    labels: tuple[LabelCodes, ...] = Field(default=(), description="codes of the classes, for answers in DICOM")
    dicom_in: DicomRules = Field(default=DicomRules(), description="which DICOM images are answered")
    architecture: dict[str, Any] = Field(description="the spec from which `medim.models` builds the torch network")
    provenance: dict[str, Any]
    metrics: dict[str, Any] = Field(default_factory=dict, description="of the run, on its validation split")
    signed_by: Sha256Digest | None = Field(
        None, description="Ed25519 public key of who signed SHA256SUMS; proves nothing"
    )

    @model_validator(mode="after")
    def _check_consistent(self) -> Contract:
        if self.preprocess_sha256 != json_sha256(list(self.preprocess)):
            raise ValueError("the preprocessing is not the one whose sha256 stands beside it")
        try:
            check_steps(self.preprocess)
            validate_section(INFERENCES, self.inference, key="mode", run_args=("run", "image"))
        except UserError as error:
            raise ValueError(str(error)) from error
        if self.postprocess != POSTPROCESS[self.kind]:
            raise ValueError(f"a {self.kind} is postprocessed by {POSTPROCESS[self.kind]}")
        if (self.kind == "encoder") == bool(self.classes):
            raise ValueError(f"a {self.kind} with classes {self.classes}")
        first_index = 1 if self.kind == "segmenter" else 0
        label_names = tuple((label.index, label.name) for label in self.labels)
        if self.labels and label_names != tuple(enumerate(self.classes, start=first_index)):
            raise ValueError(f"labels {label_names} of the classes {self.classes}")
        if self.score_map and (self.kind != "encoder" or self.score_map.signature.inputs != self.signature.inputs):
            raise ValueError("a score map that is not an encoder's, or has another input")
        return self

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.signature.inputs[0].shape) - 2

    @property
    def in_channels(self) -> int:
        """Channels of the image."""
        return int(self.signature.inputs[0].shape[1])


def parse_contract(data: bytes) -> Contract:
    """Read and check `medim.json`.

    Raises:
        PackageError: not JSON, an unknown or missing key, or contents that contradict each other.
    """
    try:
        return Contract.model_validate_json(data)
    except ValidationError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'contract'}: {e['msg']}" for e in error.errors())
        raise PackageError(
            f"medim.json: expected the contract of a package (schema {SCHEMA_VERSION}), got {reasons}. Export it again."
        ) from None
