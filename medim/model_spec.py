"""Typed specification of a saved network: how to build it, how to prepare its input, and its origin.

`encoder.json`, `model.json` and `architecture` in `medim.json` contain a `ModelSpec` as JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medim.config import Section, Size, describe_value_error
from medim.files import read_json
from medim.migrations import FILE_KEYS, rename_keys
from medim.types import Modality, Step, UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SCHEMA_VERSION = 2
_Sizes = list[Size] | tuple[Size, ...]
_MaskValue = Annotated[int, Field(ge=1, le=65535)]
_PROVENANCE_KEYS = ("config_hash", "index_hash", "where", "seed", "split_seed", "parent", "n_selection_labels")


class _Content(BaseModel):
    """Base of the schemas of the files; keys of a later version are allowed."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _NamedSection(_Content):
    name: str


class _StepSection(_Content):
    op: str


class _InferenceSection(_Content):
    mode: str


class _NetworkContent(_Content):
    encoder: _NamedSection
    in_channels: Size
    spatial_dims: Literal[2, 3]
    input_shape: _Sizes
    decoder: _NamedSection | None = None
    head: _NamedSection | None = None
    out_channels: Size | None = None

    @model_validator(mode="after")
    def _check_shape(self) -> _NetworkContent:
        if len(self.input_shape) != self.spatial_dims:
            raise ValueError(f"expected an input_shape of {self.spatial_dims} sides, got {list(self.input_shape)}")
        return self


class _ProvenanceContent(_Content):
    config_hash: str | None = None
    index_hash: str | None = None
    where: str | None = None
    seed: int | None = None
    split_seed: int | None = None
    parent: str | None = None
    n_selection_labels: int | None = None


class _SelectionContent(_Content):
    step: int | None = None
    last_step: int | None = None
    reason: str | None = None
    n_labels: int = 0


class _EncoderContent(_NetworkContent):
    kind: str
    modality: Modality
    preprocessing: list[_StepSection] | tuple[_StepSection, ...]
    inference: _InferenceSection = _InferenceSection(mode="whole")
    classes: list[str] | tuple[str, ...] = ()
    class_values: list[_MaskValue] | tuple[_MaskValue, ...] = ()
    preset: str = ""
    provenance: _ProvenanceContent | None = None
    checkpoint_selection: _SelectionContent | None = None
    channels: _Sizes | None = None
    strides: _Sizes | None = None
    summary_channels: Size | None = None
    receptive_field_voxels: _Sizes | None = None
    receptive_field_mm: list[list[float]] | None = None
    sha256: str = ""


class _ModelContent(_EncoderContent):
    head: _NamedSection
    out_channels: Size
    classes: list[str] | tuple[str, ...]
    inference: _InferenceSection

    @model_validator(mode="after")
    def _check_class_values(self) -> Self:
        values = list(self.class_values)
        if values and (len(values) != len(self.classes) or values != sorted(set(values))):
            raise ValueError(f"expected one of the ascending class_values for each of {len(self.classes)} classes")
        return self


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """Parts and sizes from which `medim.models.model` builds a network with fresh weights.

    Attributes:
        encoder: section of ENCODERS.
        in_channels: channels of an image.
        spatial_dims: 2 or 3.
        input_shape: spatial shape of a training view, in voxels.
        decoder: section of DECODERS; None without a decoder.
        head: section of HEADS; None for an encoder.
        out_channels: channels of the logits; None for an encoder.
    """

    encoder: Section
    in_channels: int
    spatial_dims: int
    input_shape: tuple[int, ...]
    decoder: Section | None = None
    head: Section | None = None
    out_channels: int | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: Path | str) -> NetworkSpec:
        """Read the network's part of a spec; other keys are ignored.

        Args:
            content: parsed JSON.
            source: file named in errors.

        Raises:
            UserError: a key is missing or has another type.
        """
        _check_content(content, _NetworkContent, source)
        return NetworkSpec(**_select_network(content))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of a network; None where the run did not record a value.

    Attributes:
        config_hash: of the run's configuration.
        index_hash: of the training images.
        where: condition that selected them, without names of images and subjects; None for all images.
        seed: random seed of weights, batches and augmentation.
        split_seed: random seed of the split by subject.
        parent: sha256 of the encoder that a fine-tuning started from; None for fresh weights.
        n_selection_labels: labels that selected the checkpoint of that encoder.
        versions: of medim, python and the libraries, by name.
    """

    config_hash: str | None = None
    index_hash: str | None = None
    where: str | None = None
    seed: int | None = None
    split_seed: int | None = None
    parent: str | None = None
    n_selection_labels: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Provenance:
        """Read the section `provenance` of a spec."""
        versions = {key: value for key, value in content.items() if key not in _PROVENANCE_KEYS}
        return cls(**{key: content.get(key) for key in _PROVENANCE_KEYS}, versions=versions)

    def to_json(self) -> Section:
        """Convert to the section `provenance`, versions beside the other keys; `parent` is always present."""
        recorded = {key: getattr(self, key) for key in _PROVENANCE_KEYS}
        return {key: value for key, value in recorded.items() if value is not None or key == "parent"} | {
            **self.versions
        }


@dataclass(frozen=True, kw_only=True)
class FeatureLayout:
    """Sizes of an encoder's features, from the finest level to the coarsest.

    Attributes:
        channels: channels per level.
        strides: input voxels per feature, per level.
        summary_channels: channels of the summary vector.
        receptive_field_voxels: side of the receptive field per level, in voxels.
        receptive_field_mm: sides of the receptive field per level, in mm; None if no preprocessing step fixes the voxel
            size.
    """

    channels: Sequence[int]
    strides: Sequence[int]
    summary_channels: int
    receptive_field_voxels: Sequence[int]
    receptive_field_mm: Sequence[Sequence[float]] | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec(NetworkSpec):
    """Content of `encoder.json` or `model.json`.

    Attributes:
        kind: encoder, segmenter, classifier or another kind of a task.
        modality: mri or xray.
        preprocessing: steps that prepare an image.
        inference: section of INFERENCES.
        classes: names of the classes, without background; empty for an encoder.
        class_values: value of each class in mask files, of a segmenter; empty in specs of earlier versions, whose
            values are the numbers of the classes, and for other kinds.
        preset: name of the configuration.
        provenance: origin.
        checkpoint_selection: the checkpoint whose weights were saved, and the reason; None for a model.
        layout: sizes of the features; None for a model.
        sha256: of the weights; empty before they are saved.
        extra: keys of the file that this version does not use; kept when the spec is written again.
    """

    kind: str
    modality: Modality
    preprocessing: tuple[Step, ...]
    inference: Section = field(default_factory=lambda: {"mode": "whole"})
    classes: tuple[str, ...] = ()
    class_values: tuple[int, ...] = ()
    preset: str = ""
    provenance: Provenance = Provenance()
    checkpoint_selection: Mapping[str, Any] | None = None
    layout: FeatureLayout | None = None
    sha256: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_encoder(self) -> bool:
        """Whether the network is a pretrained encoder without head."""
        return self.kind == "encoder"

    @property
    def n_selection_labels(self) -> int:
        """Labels that the online probe used to select the checkpoint of the encoder, or of the encoder of a model."""
        if self.is_encoder:
            return int((self.checkpoint_selection or {}).get("n_labels", 0))
        return self.provenance.n_selection_labels or 0

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: Path | str) -> ModelSpec:
        """Read a spec.

        Args:
            content: parsed JSON.
            source: file named in errors.

        Raises:
            UserError: a key is missing or has another type.
        """
        content = rename_keys(content, "model_spec")
        _check_content(content, _EncoderContent, source)
        if content["kind"] != "encoder":
            _check_content(content, _ModelContent, source)
        values = {key: content[key] for key in ("kind", "modality", "inference", "preset", "sha256") if key in content}
        has_layout = all(key in content for key in FeatureLayout.__dataclass_fields__)
        layout = {key: content[key] for key in FeatureLayout.__dataclass_fields__} if has_layout else {}
        known_keys = {*cls.__dataclass_fields__, *layout, "schema_version"}
        return cls(
            **_select_network(content),
            **values,
            preprocessing=tuple(content["preprocessing"]),
            classes=tuple(content.get("classes", ())),
            class_values=tuple(content.get("class_values", ())),
            provenance=Provenance.from_json(content.get("provenance") or {}),
            checkpoint_selection=content.get("checkpoint_selection"),
            layout=FeatureLayout(**layout) if layout else None,
            extra={key: value for key, value in content.items() if key not in known_keys},
        )

    def to_json(self) -> Section:
        """Convert to the content of the file, in its order of keys."""
        content: Section = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "modality": self.modality,
            "spatial_dims": self.spatial_dims,
            "in_channels": self.in_channels,
            "input_shape": list(self.input_shape),
            "encoder": self.encoder,
            "preprocessing": list(self.preprocessing),
            "inference": self.inference,
            "classes": list(self.classes),
            **({"class_values": list(self.class_values)} if self.class_values else {}),
            "preset": self.preset,
        }
        if self.provenance != Provenance():
            content["provenance"] = self.provenance.to_json()
        content["decoder"] = self.decoder
        optional = {
            "head": self.head,
            "out_channels": self.out_channels,
            "checkpoint_selection": self.checkpoint_selection,
        }
        content |= {key: value for key, value in optional.items() if value is not None}
        content |= (asdict(self.layout) if self.layout else {}) | dict(self.extra)
        return content | ({"sha256": self.sha256} if self.sha256 else {})

    def __getitem__(self, key: str) -> Any:
        """Value of a key of the file. Deprecated: use the attribute."""
        warnings.warn(
            f"spec[{key!r}] is deprecated and will be removed in the next release; use spec.{key}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.to_json()[FILE_KEYS["model_spec"].get(key, key)]


def read_spec(file: Path) -> ModelSpec:
    """Read `encoder.json` or `model.json`.

    Raises:
        UserError: a key is missing or has another type.

    Examples:
        >>> import json, tempfile
        >>> file = Path(tempfile.mkdtemp()) / "encoder.json"
        >>> content = {"kind": "encoder", "modality": "mri", "preprocessing": [{"op": "ras"}], "in_channels": 1}
        >>> content |= {"encoder": {"name": "unet"}, "spatial_dims": 3, "input_shape": [32, 32, 32]}
        >>> _ = file.write_text(json.dumps(content))
        >>> read_spec(file).input_shape
        (32, 32, 32)
    """
    return ModelSpec.from_json(read_json(file), file)


def _select_network(content: Mapping[str, Any]) -> dict[str, Any]:
    optional = {key: content.get(key) for key in ("decoder", "head", "out_channels")}
    required = {key: content[key] for key in ("encoder", "in_channels", "spatial_dims")}
    return {**required, "input_shape": tuple(content["input_shape"]), **optional}


def _check_content(content: Mapping[str, Any], schema: type[_Content], source: Path | str) -> None:
    """Check the keys of a spec and their values against a schema.

    Raises:
        UserError: a key is missing or has another value.
    """
    try:
        schema.model_validate(content)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("list[", "tuple[")))
        if fault["type"] == "missing":
            problem = f"expected the key {key!r} of a network's spec, which is missing"
        elif key:
            problem = f"expected the key {key!r} of a network's spec to be {_describe_value(fault)}"
        else:
            problem = fault["msg"].removeprefix("Value error, ")
        provenance = content.get("provenance")
        version = provenance.get("medim", "unknown") if isinstance(provenance, Mapping) else "unknown"
        raise UserError(
            f"{source}: {problem} (written by medim {version}). "
            "Copy the file again, or train or export again with this version."
        ) from None


def _describe_value(fault: ErrorDetails) -> str:
    """Describe the expected and the given value of a key, without a long text."""
    expected, _, given = describe_value_error(fault).removeprefix("expected ").partition(", got ")
    return f"{expected}, got {given[:100].removesuffix('.')}"
