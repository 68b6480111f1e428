"""Schema of `medim.json`, the contract of a package: data without code, expressions or patient data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, ValidationError, model_validator

from medim.config import validate_section
from medim.data.preprocessing.steps import check_steps
from medim.files import json_sha256
from medim.inference.network import INFERENCES
from medim.inference.ood import LimitMethod
from medim.integrity import PackageError
from medim.model_spec import ModelSpec
from medim.package.dicom_rules import DicomRules
from medim.package.label_codes import LabelCode as LabelCodes
from medim.package.schema import StrictModel as _Strict
from medim.parsing import parse_json
from medim.tasks import ENCODER, find_task_of_kind, is_dense, map_tasks_by_kind
from medim.tasks.task import Inversion, OutputActivation
from medim.types import Modality, Step, UserError

SCHEMA_VERSION = 2
RESEARCH_ONLY = "Research use only: not a medical device, not for diagnosis, treatment or any decision about a patient."
NOT_REPORTED = "not reported"
WEIGHTS, GRAPH = "models/model.safetensors", "models/model.onnx"
REPORT, GOLDEN = "parity/report.json", "parity/golden.safetensors"
STATISTICS = "models/reference.safetensors"
SCORE_MAP, SCORE_MAP_GOLDEN = "models/score_map.onnx", "parity/score_map.safetensors"

PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]{0,63}$")]
ClassName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,64}$")]
Sha256Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Symbol(_Strict):
    """Variable axis length: `minimum <= n <= maximum`, a multiple of `multiple_of`."""

    minimum: PositiveInt = 1
    maximum: PositiveInt | None = None
    multiple_of: PositiveInt = 1


class TensorSpec(_Strict):
    """Input or output of the network. An axis length is a number, the name of a symbol, or `symbol/stride`.

    If convolutions are not padded, a feature map has fewer cells than `symbol/stride`, with a spacing of `stride`
    voxels.
    """

    name: str
    dtype: Literal["float32", "float64"] = "float32"
    shape: tuple[int | str, ...]


class Signature(_Strict):
    """Inputs and outputs of the network. The first output is the prediction."""

    inputs: tuple[TensorSpec]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    symbols: dict[str, Symbol]

    @model_validator(mode="after")
    def _check_sides(self) -> Signature:
        shape = self.inputs[0].shape
        if len(shape) not in (4, 5) or not isinstance(shape[1], int) or min(len(o.shape) for o in self.outputs) < 2:
            raise ValueError("expected an input (batch, channels, 2 or 3 spatial axes) and outputs of at least 2 axes")
        if unknown_sides := {side for side in shape if isinstance(side, str)} - self.symbols.keys():
            raise ValueError(f"no symbol defines the axis lengths {sorted(unknown_sides)}")
        return self

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Check an input shape against the contract.

        Raises:
            UserError: the network does not accept this shape.
        """
        expected = self.inputs[0].shape
        fits = len(shape) == len(expected) and all(map(self._fits_side, shape, expected))
        if not fits:
            rules = {name: symbol.model_dump(exclude_none=True) for name, symbol in self.symbols.items()}
            raise UserError(
                f"network: expected an input {list(expected)} with {rules}, "
                f"got {list(shape)}. Preprocess or pad the input to a shape that the network accepts."
            )

    def _fits_side(self, side: int, expected: int | str) -> bool:
        if isinstance(expected, int):
            return side == expected
        symbol = self.symbols[expected]
        return symbol.minimum <= side <= (symbol.maximum or side) and side % symbol.multiple_of == 0


class ScoreMapSpec(_Strict):
    """Graph of the mutual-information map of an encoder: critic score of each voxel of the input."""

    signature: Signature
    critic: dict[str, Any] = Field(description="objective that trained the critic, and sha256 of its weights")


class OODStatistics(_Strict):
    """Origin of the out-of-distribution statistics in `models/reference.safetensors`."""

    sha256: Sha256Digest = Field(description="sha256 of the statistics file")
    images: PositiveInt
    subjects: PositiveInt
    held_out_images: PositiveInt
    held_out_subjects: PositiveInt
    method: LimitMethod = Field(description="estimation of the limits on the held-out subjects")
    false_alarms: float = Field(description="expected fraction of the images of new subjects that are flagged")

    def __str__(self) -> str:
        """Summary for the model card."""
        return (
            f"statistics of {self.images} images of {self.subjects} subjects; limits from {self.held_out_images} "
            f"images of {self.held_out_subjects} other subjects ({self.method}), "
            f"{self.false_alarms:.0%} false positive rate"
        )


class Postprocess(_Strict):
    """Postprocessing of the first output; only the listed values are allowed."""

    activation: OutputActivation
    invert: Inversion


def postprocess_of(kind: str) -> Postprocess:
    """How the answer of a network kind is made."""
    if kind == ENCODER:
        return Postprocess(activation="none", invert="none")
    task = find_task_of_kind(kind)
    return Postprocess(activation=task.activation, invert=task.inversion)


def _check_kind(kind: str) -> str:
    kinds = (ENCODER, *map_tasks_by_kind())
    if kind not in kinds:
        raise ValueError(f"expected one of {', '.join(kinds)}, got {kind!r}")
    return kind


class Contract(_Strict):
    """The content of `medim.json`.

    Examples:
        >>> Contract.model_json_schema()["required"]
        ['name', 'version', 'kind', 'modality', 'preprocess', 'preprocess_sha256', 'inference', 'postprocess',
        'signature', 'architecture', 'provenance']
    """

    schema_version: Literal[2] = 2
    name: PackageName
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+([-+][0-9A-Za-z.-]+)?$")]
    kind: Annotated[str, AfterValidator(_check_kind)]
    modality: Modality
    intended_use: str = NOT_REPORTED
    not_for: str = RESEARCH_ONLY
    preprocess: tuple[Step, ...]
    preprocess_sha256: Sha256Digest
    inference: Step
    postprocess: Postprocess
    signature: Signature
    score_map: ScoreMapSpec | None = Field(
        default=None, description="mutual-information map of an encoder that was trained with a local critic"
    )
    reference: OODStatistics | None = Field(
        default=None, description="statistics of the out-of-distribution detector; None for older runs"
    )
    classes: tuple[ClassName, ...] = Field(
        default=(), max_length=255, description="class names; for a segmenter without the background"
    )
    labels: tuple[LabelCodes, ...] = Field(default=(), description="codes of the classes for DICOM output")
    dicom_in: DicomRules = Field(default=DicomRules(), description="rules for accepted DICOM images")
    architecture: dict[str, Any] = Field(description="spec from which `medim.models` builds the torch network")
    provenance: dict[str, Any]
    metrics: dict[str, Any] = Field(default_factory=dict, description="metrics of the run on its validation split")
    signed_by: Sha256Digest | None = Field(
        None, description="Ed25519 public key of the signer of SHA256SUMS; no proof of identity"
    )

    @model_validator(mode="after")
    def _check_consistent(self) -> Contract:
        if self.preprocess_sha256 != json_sha256(list(self.preprocess)):
            raise ValueError("`preprocess_sha256` is not the sha256 of `preprocess`")
        try:
            check_steps(self.preprocess)
            validate_section(INFERENCES, self.inference, key="mode", run_args=("run", "image"))
        except UserError as error:
            raise ValueError(str(error)) from error
        if self.postprocess != postprocess_of(self.kind):
            raise ValueError(f"expected the postprocessing {postprocess_of(self.kind)} for a {self.kind}")
        if (self.kind == ENCODER) == bool(self.classes):
            raise ValueError(f"the classes {self.classes} do not match the kind {self.kind}")
        first_index = 1 if is_dense(self.kind) else 0
        label_names = tuple((label.index, label.name) for label in self.labels)
        if self.labels and label_names != tuple(enumerate(self.classes, start=first_index)):
            raise ValueError(f"the labels {label_names} do not match the classes {self.classes}")
        self._check_architecture()
        if self.score_map and (self.kind != ENCODER or self.score_map.signature.inputs != self.signature.inputs):
            raise ValueError("a score map requires an encoder with the same input")
        return self

    def _check_architecture(self) -> None:
        """Check that the network of `architecture` is the one that the other keys describe."""
        try:
            spec = self.spec
        except UserError as error:
            raise ValueError(str(error)) from error
        pairs = {
            "kind": (self.kind, spec.kind),
            "modality": (self.modality, spec.modality),
            "classes": (list(self.classes), list(spec.classes)),
            "preprocess": (list(self.preprocess), list(spec.preprocessing)),
            "in_channels": (self.in_channels, spec.in_channels),
            "spatial_dims": (self.spatial_dims, spec.spatial_dims),
        }
        for key, (own, built) in pairs.items():
            if own != built:
                raise ValueError(f"{key} {own} differs from {built} in `architecture`")

    @property
    def spec(self) -> ModelSpec:
        """Typed form of `architecture`."""
        return ModelSpec.from_json(self.architecture, "medim.json")

    @property
    def spatial_dims(self) -> int:
        """2 or 3."""
        return len(self.signature.inputs[0].shape) - 2

    @property
    def in_channels(self) -> int:
        """Number of image channels."""
        return int(self.signature.inputs[0].shape[1])


def parse_contract(data: bytes) -> Contract:
    """Read and check `medim.json`.

    Raises:
        PackageError: the data are not JSON, the schema version is another, a key is unknown or missing, or values are
            inconsistent.
    """
    try:
        return Contract.model_validate(parse_json(data))
    except ValidationError as error:
        for fault in error.errors():
            version = fault["input"]
            if fault["loc"] == ("schema_version",) and isinstance(version, int) and version < SCHEMA_VERSION:
                raise PackageError(
                    f"medim.json: schema version {version}, made by an earlier version of medim: export it again. "
                    "If the run has model/reference.npz or encoder/reference.npz, delete that file first (the new "
                    "package has no out-of-distribution score), or train the run again."
                ) from None
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'contract'}: {e['msg']}" for e in error.errors())
        raise PackageError(
            f"medim.json: expected the contract of a package (schema {SCHEMA_VERSION}), got {reasons}. Export it again."
        ) from None
    except ValueError as error:
        raise PackageError(f"medim.json: expected JSON ({error}). Copy the package again.") from None
