"""Run configuration: one YAML file per run, validated against types and constructor signatures.

`load_config` reads a preset or a file, applies `--set key=value` and validates the result. `validate_section` and
`build_from_section` check a section such as `{name: unet, channels: [8, 16]}` against the signature of the
constructor. A new class therefore needs no change here, and no class receives a config object.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from medim.files import json_sha256
from medim.neutral_names import is_neutral_name
from medim.parsing import MAX_NUMBER, MAX_YAML_BYTES, find_extreme_number, parse_yaml, read_text
from medim.renamed_keys import RUN, translate_config, translate_item, translate_preset, translate_section
from medim.types import Modality, UsageError, UserError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

log = logging.getLogger(__name__)
Section = dict[str, Any]
Command = Literal["pretrain", "finetune"]
OptimiserName = Literal["adamw", "adam", "radam"]
SelectionCriterion = Literal["probe", "loss"]
Schedule = Literal["cosine", "constant", "multistep"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
Decay = typing.Annotated[float, Field(ge=0, lt=1)]
Size = typing.Annotated[int, Field(ge=1, le=65_536)]  # channels, voxels or units of a layer
SizeOrZero = typing.Annotated[int, Field(ge=0, le=65_536)]
Overlap = typing.Annotated[float, Field(ge=0, lt=1)]  # of adjacent windows, as a fraction of a window
Share = typing.Annotated[float, Field(gt=0, lt=1)]
PositiveNumber = typing.Annotated[float, Field(gt=0)]
Percentile = typing.Annotated[float, Field(ge=0, le=100)]
Millimetres = typing.Annotated[float, Field(gt=0, le=1000)]
_Steps = typing.Annotated[int, Field(ge=1, le=10**9)]
_ViewSide = typing.Annotated[int, Field(ge=2, le=4096)]
T = typing.TypeVar("T")
# Keys added later, with the value that all earlier runs had: with this value they do not enter the hash.
KEYS_ADDED_LATER = {
    "compile": False,
    "gradient_cache_chunk": None,
    "checkpoint_selection": "probe",
    "balanced_batches": False,
    "views.foreground_share": 0.0,
}
_TEST_PRESET_PREFIX = "test-"  # presets of the test suite, left out of messages
MAX_EXTENDED_FILES = 20
MAX_WORKERS = 256  # loading processes; PyTorch warns if a machine has fewer cores
AUTO = "auto"  # placeholder for numbers that depend on the images; `medim.training.auto_config` fills them in


class _StrictConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ViewsConfig(_StrictConfig):
    """Views of a batch: crops of the preprocessed image and their random augmentation."""

    shape: tuple[_ViewSide, ...] = Field(
        min_length=2, max_length=3, description="size of a view, in voxels of the preprocessed image"
    )
    count: Literal[1, 2] = Field(
        1, description="views per image; with 2, the summary of one is compared with the maps of the other"
    )
    same_crop: bool = Field(True, description="crop all views of an image at the same position")
    augmentations: list[Section] = Field(
        default_factory=list, description="random transforms, sampled anew for each view"
    )
    foreground_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="segmentation: probability that a crop is centred on a voxel of a class; 0 draws all positions "
        "uniformly",
    )

    @model_validator(mode="before")
    @classmethod
    def _translate_old_keys(cls, content: Any) -> Any:
        return translate_section(content, section="views")


class RunConfig(_StrictConfig):
    """Settings common to all runs. The hash of the resolved config identifies the run."""

    name: str = Field(
        "custom",
        pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$",
        description="name of the preset that the run is based on",
    )
    modality: Modality = Field(description="mri or xray")
    preprocessing: list[Section] = Field(description="deterministic steps; saved with the encoder")
    views: ViewsConfig = Field(description="crops and augmentation of a batch")
    encoder: Section = Field(description="an entry of ENCODERS and its options")
    max_steps: _Steps = Field(description="optimiser steps of the whole run")
    batch_size: Size = Field(description="images per step, over all devices")
    lr: float = Field(gt=0, le=10, description="peak learning rate")
    optimiser: OptimiserName = Field("adamw", description="adamw, adam or radam; the last two reproduce papers")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="the optimiser's decay rates of its two moments")
    schedule: Schedule = Field(
        "cosine",
        description="learning rate after warm-up: cosine decay to zero, constant, or multistep: divided by 5 at each "
        "of lr_milestones",
    )
    lr_milestones: tuple[_Steps, ...] = Field(
        (), description="steps at which the schedule `multistep` reduces the learning rate"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, at most max_steps")
    weight_decay: float = Field(
        0.01, ge=0, le=100, description="weight decay of matrices; decoupled from the gradient only in AdamW"
    )
    gradient_clip: float = Field(1.0, ge=0, le=1e6, description="largest gradient norm; 0 does not clip")
    checkpoint_every_steps: _Steps = Field(100, description="steps between two checkpoints")
    precision: Precision = Field(
        "32-true",
        description="Lightning's precision; objective scores are always fp32, and so is everything on a CPU in 3D "
        "or without bf16 arithmetic",
    )
    workers: int = Field(0, ge=0, le=MAX_WORKERS, description="loading processes; 0 loads in the training process")
    prefetch: int = Field(2, ge=1, le=1000, description="batches that each loading process prepares in advance")

    @model_validator(mode="before")
    @classmethod
    def _translate_old_keys(cls, content: Any) -> Any:
        return translate_config(content) if isinstance(content, Mapping) else content

    @model_validator(mode="after")
    def _check_warmup(self) -> RunConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(
                f"warmup_steps: expected at most max_steps ({self.max_steps}), got {self.warmup_steps}. "
                "Reduce warmup_steps, or increase max_steps"
            )
        return self

    @model_validator(mode="after")
    def _check_lr_milestones(self) -> RunConfig:
        if bool(self.lr_milestones) != (self.schedule == "multistep"):
            raise ValueError("schedule: multistep needs lr_milestones, and lr_milestones needs schedule: multistep")
        return self

    @property
    def spatial_dims(self) -> int:
        """Number of spatial dimensions of the views: 2 or 3."""
        return len(self.views.shape)

    @property
    def optimisation(self) -> dict[str, Any]:
        """Arguments of `medim.training.engine.optim.build_optimiser`."""
        keys = ("lr", "optimiser", "betas", "schedule", "lr_milestones", "warmup_steps", "weight_decay", "max_steps")
        return {key: getattr(self, key) for key in keys}

    @property
    def hash(self) -> str:
        """Twelve hex digits that identify the computation.

        The preset name and the data-loading settings are excluded. Keys of `KEYS_ADDED_LATER` are included only if
        they do not have the value that all earlier runs had, so that a new key changes no hash.
        """
        content = self.model_dump(mode="json", exclude={"name", "workers", "prefetch"})
        for path, earlier in KEYS_ADDED_LATER.items():
            section, _, key = path.rpartition(".")
            keys = content[section] if section else content
            if key in keys and keys[key] == earlier:
                del keys[key]
        return json_sha256(content)[:12]


class PretrainConfig(RunConfig):
    """A pretraining run: a list of weighted objectives."""

    objectives: list[Section] = Field(min_length=1, description="entries of OBJECTIVES, each with a weight (default 1)")
    decoder: Section | None = Field(
        None, description="an entry of DECODERS, for objectives that decode; saved with the encoder"
    )
    gradient_cache_chunk: Size | None = Field(
        None,
        description="images per forward pass of encoder and decoder, without stored activations: less memory, one "
        "more forward pass, the same gradient; null: the whole batch at once",
    )
    compile: bool = Field(False, description="compile encoder and decoder with torch.compile")
    checkpoint_selection: SelectionCriterion = Field(
        "loss",
        description="criterion that selects the saved step. loss: the validation loss, without labels. probe: an "
        "online probe of labelled training subjects; the validation loss if there are too few labels",
    )

    @model_validator(mode="after")
    def _check_foreground_share(self) -> PretrainConfig:
        if self.views.foreground_share:
            raise ValueError(
                "views.foreground_share: expected 0 in pretraining, which uses no masks, got "
                f"{self.views.foreground_share:g}. Set it in the configuration of a segmentation"
            )
        return self


class FinetuneConfig(RunConfig):
    """A fine-tuning run. The pretrained encoder and the from-scratch baseline use the same schedule."""

    task: str = Field(description="task to learn")
    decoder: Section | None = Field(None, description="an entry of DECODERS; segmentation needs one")
    head: Section = Field(description="an entry of HEADS and its options")
    pretrained_lr_scale: float = Field(
        1.0,
        ge=0,
        le=1e6,
        description="learning rate of the pretrained parts (encoder, decoder) relative to lr; 0 freezes them. New "
        "parts use lr",
    )
    head_init: Literal["random", "probe"] = Field(
        "random", description="probe: initialise the head from a linear probe of the features"
    )
    balanced_batches: bool = Field(
        False,
        description="draw equally many images of each class for a batch, so that rare classes are repeated; only for "
        "classification with one class per image",
    )
    eval_steps: tuple[_Steps, ...] | None = Field(
        None,
        description="steps after which the validation split is measured, for information only; null: none, or a "
        "number that `medim study` derives from its time budget",
    )
    inference: Section = Field(
        default_factory=lambda: {"mode": "whole"}, description="inference on a whole image; saved with the model"
    )


CONFIG_CLASSES: dict[Command, type[RunConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}


def list_presets(command: Command) -> dict[str, Path]:
    """Map the names of the shipped presets of a command to their files."""
    package_folder = Path(__file__).parent
    folder = next((f for f in (package_folder / "configs", package_folder.parent / "configs") if f.is_dir()), None)
    if folder is None:
        raise UserError(f"{package_folder}: the shipped presets are missing; reinstall medim.")
    return {path.stem: path for path in sorted((folder / command).glob("*.yaml"))}


def read_config(command: Command, name_or_path: str) -> Section:
    """Read a preset by name, or a YAML file by path, without validation.

    A file with `extends: NAME` contains only the differences: its keys replace those of the named preset (or file),
    and its `views` are merged key by key.

    Raises:
        UsageError: no such preset or file, not a YAML mapping (see `medim.parsing.parse_yaml`), or files that extend
            each other in a cycle.

    Examples:
        >>> _ = Path("short.yaml").write_text("{extends: mri-crop, max_steps: 100}")
        >>> content = read_config("pretrain", "short.yaml")
        >>> content["name"], content["max_steps"], content["modality"]
        ('short', 100, 'mri')
    """
    return _read_extended(command, name_or_path, ())


def _read_extended(command: Command, name_or_path: str, ancestors: tuple[str, ...]) -> Section:
    preset_paths = list_presets(command)
    path = preset_paths.get(translate_preset(name_or_path)) or Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"--config {name_or_path}: {unknown_preset_message('preset or file', name_or_path, preset_paths)}"
        )
    file_content = read_yaml_mapping(path)
    try:
        content: Section = translate_config(file_content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    base = content.pop("extends", None)
    if base is not None:
        if str(base) in (*ancestors, path.stem, str(path)):
            raise UsageError(f"{path}: extends {base}, which extends {path}. Remove one of the two `extends`.")
        if len(ancestors) > 2 * MAX_EXTENDED_FILES:
            raise UsageError(f"{path}: expected at most {MAX_EXTENDED_FILES} files that extend each other, got more.")
        extended = _read_extended(command, str(base), (*ancestors, path.stem, str(path)))
        views = {**extended.get("views", {}), **content["views"]} if isinstance(content.get("views"), dict) else None
        inherits_warmup = "warmup_steps" not in content
        content = {
            **extended,
            "name": _name_config(path, preset_paths),
            **content,
            **({"views": views} if views else {}),
        }
        if inherits_warmup:
            _shorten_warmup(content)
    return {"name": _name_config(path, preset_paths), **content}


def _name_config(path: Path, preset_paths: Mapping[str, Path]) -> str:
    """Name a configuration after its file, unless the file may be named after a person: specs and MLflow show it."""
    is_preset = path in preset_paths.values()
    return path.stem if is_preset or is_neutral_name(path.stem) else "config"


def read_yaml_mapping(path: Path) -> Section:
    """Read a YAML file whose content is a mapping with text keys.

    Raises:
        UsageError: the file cannot be read, or is not such a mapping; see `medim.parsing.parse_yaml`.
    """
    try:
        content = parse_yaml(read_text(path, MAX_YAML_BYTES))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except ValueError as error:
        raise UsageError(f"{path}: expected YAML ({error}). Correct the file.") from error
    except UserError as error:
        raise UsageError(str(error)) from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a YAML mapping, got {type(content).__name__}. Correct the file.")
    if not all(isinstance(key, str) for key in content):
        raise UsageError(f"{path}: expected names as keys, got {next(k for k in content if not isinstance(k, str))!r}.")
    return content


def apply_overrides(content: Section, assignments: Iterable[str]) -> Section:
    """Apply `key=value` assignments; keys may be dotted (`views.shape=[64,64,64]`, `objectives.0.weight=2`).

    An item of a list has the name of its section, too (`objectives.local_dim.weight=2`).

    Raises:
        UsageError: an assignment without `=`, a path to a key or item that does not exist, or two assignments with the
            old and the new name of a key.

    Examples:
        >>> content = {"max_steps": 2000, "views": {"shape": [64, 64, 64]}}
        >>> apply_overrides(content, ["views.shape=[32,32,32]", "max_steps=100"])
        {'max_steps': 100, 'views': {'shape': [32, 32, 32]}}
    """
    content = translate_config(copy.deepcopy(content))
    given_keys: dict[tuple[str, ...], str] = {}  # place: last part of the path as given
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: expected key=value.")
        try:
            value = parse_yaml(value)
        except ValueError as error:
            raise UsageError(f"--set {assignment[:200]}: expected YAML after the equals sign ({error}).") from error
        target: Any = content
        *parents, last = path.split(".")
        for part in parents:
            target = _get_item(target, part, assignment)
        if isinstance(target, list):
            target[_find_position(target, last, assignment)] = translate_section(value)
        elif isinstance(target, dict):
            key, target[key] = translate_item(_section_of(parents, target), last, value)
            given = given_keys.setdefault((*parents, key), last)
            if given != last:
                raise UsageError(f"--set {assignment}: {given} and {last} are names of one key. Use {key} only.")
        else:
            raise UsageError(f"--set {assignment}: {'.'.join(parents)} is a {type(target).__name__} without keys.")
    if ("max_steps",) in given_keys and ("warmup_steps",) not in given_keys:
        _shorten_warmup(content)
    return content


def _shorten_warmup(content: Section) -> None:
    """Reduce the warm-up of a preset to a tenth of the steps, if there are fewer steps than the preset warms up."""
    steps, warmup = content.get("max_steps"), content.get("warmup_steps", 0)
    if type(steps) is int and type(warmup) is int and 0 < steps < warmup:
        content["warmup_steps"] = steps // 10
        log.info("warmup_steps: %d instead of %d, because max_steps is %d", steps // 10, warmup, steps)


def _section_of(parents: Sequence[str], target: Section) -> str:
    """Name of the section of `medim.renamed_keys` that a mapping at this path is."""
    if not parents:
        return RUN
    return "views" if list(parents) == ["views"] else str(target.get("name"))


@typing.overload
def load_config(command: Literal["pretrain"], name_or_path: str, assignments: Sequence[str] = ()) -> PretrainConfig: ...
@typing.overload
def load_config(command: Literal["finetune"], name_or_path: str, assignments: Sequence[str] = ()) -> FinetuneConfig: ...
def load_config(command: Command, name_or_path: str, assignments: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate the configuration of a run; no value may be left `auto`.

    Args:
        command: command that the configuration is for.
        name_or_path: a preset's name or a YAML file.
        assignments: `key=value` strings, applied in order.

    Raises:
        UsageError: an unknown key or a value of the wrong type; the message suggests the nearest valid spelling.
    """
    return check_config(command, apply_overrides(read_config(command, name_or_path), assignments), source=name_or_path)


def check_config(command: Command, content: Section, *, source: str) -> RunConfig:
    """Validate the content of a configuration without `auto` values; see `load_config`."""
    config_class = CONFIG_CLASSES[command]
    if extreme := find_extreme_number(content):
        raise UsageError(
            f"config {source}: {extreme[0]}: expected a finite number of at most {MAX_NUMBER:g}, got {extreme[1]:.4g}."
        )
    try:
        config = config_class.model_validate(content)
    except ValidationError as error:
        raise UsageError(
            f"config {source}: " + " ".join(_describe_config_error(config_class, e) for e in error.errors())
        ) from None
    if path := _find_converted_boolean(content, config):
        raise UsageError(f"config {source}: {_describe_boolean(path)}")
    if remaining_keys := auto_keys(content):
        raise UsageError(f"config {source}: {', '.join(remaining_keys)}: no rule for {AUTO!r} here; give a value.")
    return config


@contextmanager
def name_config(config: RunConfig) -> Iterator[None]:
    """Begin the message of a `UsageError` with the name of the configuration, unless it begins with an option.

    Examples:
        >>> with name_config(load_config("pretrain", "cpc")):
        ...     raise UsageError("batch_size: expected 2 or more.")
        Traceback (most recent call last):
        medim.types.UsageError: config cpc: batch_size: expected 2 or more.
    """
    try:
        yield
    except UsageError as error:
        if str(error).startswith(("config ", "-")):
            raise
        raise UsageError(f"config {config.name}: {error}") from error


def auto_keys(content: Any, prefix: str = "") -> list[str]:
    """List the dotted keys whose value is `auto`."""
    if isinstance(content, dict | list):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return [key for part, value in items for key in auto_keys(value, f"{prefix}.{part}" if prefix else str(part))]
    return [prefix] if content == AUTO else []


def dump_config(config: RunConfig) -> str:
    """Format the resolved configuration as YAML, with all defaults written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)


def validate_section(
    table: Mapping[str, Callable[..., T]], section: Section, *, key: str = "name", run_args: Iterable[str] = ()
) -> tuple[Callable[..., T], dict[str, Any]]:
    """Check a section against the signature of the table entry that it names.

    Args:
        table: name to constructor (or function).
        section: `{key: name, **options}`.
        key: key of the name in the section.
        run_args: parameters that the caller passes itself.

    Returns:
        The constructor and its checked options.

    Raises:
        UsageError: an unknown name or option, a missing option, or a value of the wrong type.
    """
    options = dict(translate_section(section))
    name = options.pop(key, None)
    if not isinstance(name, str) or name not in table:
        raise UsageError(unknown_name_message(key, str(name), table))
    constructor = table[name]
    parameters = inspect.signature(constructor).parameters
    hints = typing.get_type_hints(
        constructor.__init__ if inspect.isclass(constructor) else constructor, include_extras=True
    )
    allowed = [p for p in parameters if p not in set(run_args)]
    for option, value in options.items():
        if option not in allowed:
            raise UsageError(f"{name}: {unknown_name_message('option', str(option), allowed)}")
        if extreme := find_extreme_number(value, (name, option)):
            raise UsageError(f"{extreme[0]}: expected a finite number of at most {MAX_NUMBER:g}, got {extreme[1]:.4g}.")
        try:
            options[option] = TypeAdapter(hints[option]).validate_python(value)
        except ValidationError as error:
            raise UsageError(_describe_option_error(f"{name}.{option}", value, error.errors())) from None
        if path := _find_converted_boolean(value, options[option], f"{name}.{option}"):
            raise UsageError(_describe_boolean(path))
    missing = [p for p in allowed if parameters[p].default is inspect.Parameter.empty and p not in options]
    if missing:
        raise UsageError(f"{name}: {', '.join(missing)} must be given.")
    return constructor, options


def build_from_section(
    table: Mapping[str, Callable[..., T]], section: Section, *, key: str = "name", **run_args: Any
) -> T:
    """Construct the table entry that a section names.

    Args:
        table: name to constructor.
        section: `{key: name, **options}`, checked as in `validate_section`.
        key: key of the name in the section.
        **run_args: values known only at run time (spatial_dims, channels, ...), passed if the constructor has such a
            parameter.

    Raises:
        UsageError: see `validate_section`.

    Examples:
        >>> def describe_pool(channels: int, *, size: int = 3) -> str:
        ...     return f"{channels} channels, size {size}"
        >>> build_from_section({"pool": describe_pool}, {"name": "pool", "size": 5}, channels=8)
        '8 channels, size 5'
    """
    constructor, options = validate_section(table, section, key=key, run_args=run_args)
    parameters = inspect.signature(constructor).parameters
    return constructor(**options, **{name: value for name, value in run_args.items() if name in parameters})


def _get_item(target: Any, part: str, assignment: str) -> Any:
    if isinstance(target, dict) and part in target:
        return target[part]
    if isinstance(target, list):
        return target[_find_position(target, part, assignment)]
    keys = list(target) if isinstance(target, dict) else []
    raise UsageError(f"--set {assignment}: {unknown_name_message('key', part, keys)}")


def _find_position(items: Sequence[Any], part: str, assignment: str) -> int:
    """Find an item of a list by its number, or by the name of its section if no other has it."""
    if part.isdigit() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name") or item.get("op") or "") if isinstance(item, dict) else "" for item in items]
    if names.count(part) == 1:
        return names.index(part)
    keys = [name if name and names.count(name) == 1 else str(place) for place, name in enumerate(names)]
    raise UsageError(f"--set {assignment}: {unknown_name_message('key', part, keys)}")


def unknown_name_message(kind: str, name: str, choices: Iterable[str]) -> str:
    """Format the message about an unknown name, with the nearest and all valid names."""
    names = sorted(choices)
    return f"no {kind} {name!r}.{suggest_name(name, names)} There are: {', '.join(names) or 'none'}."


def unknown_preset_message(kind: str, name: str, preset_names: Iterable[str]) -> str:
    """Format the message about an unknown preset with the three nearest, without the presets of the test suite."""
    names = sorted(preset for preset in preset_names if not preset.startswith(_TEST_PRESET_PREFIX))
    starts = [preset for preset in names if len(name) > 2 and preset.startswith(name)]
    nearest = list(dict.fromkeys([*starts, *difflib.get_close_matches(name, names, n=3, cutoff=0.5)]))[:3]
    listing = " or ".join(
        [", ".join(map(repr, nearest[:-1])), repr(nearest[-1])] if nearest[1:] else map(repr, nearest)
    )
    question = f" Did you mean {listing}?" if nearest else ""
    return f"no {kind} {name!r}.{question} `medim config list --all` lists all."


def suggest_name(name: str, names: Sequence[str]) -> str:
    """Format the question for the nearest name, after a space; empty if no name is near."""
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def describe_value_error(error: ErrorDetails) -> str:
    """Describe one error of pydantic as a sentence: the expected value, the given value and the nearest valid name.

    Examples:
        >>> try:
        ...     TypeAdapter(Schedule).validate_python("cosin")
        ... except ValidationError as error:
        ...     print(describe_value_error(error.errors()[0]))
        expected cosine, constant or multistep, got 'cosin'. Did you mean 'cosine'?
    """
    value = error["input"]
    hint = suggest_name(value, _list_choices(error)) if isinstance(value, str) else ""
    return f"expected {_describe_expected_value(error)}, got {value!r}.{hint}"


def _describe_expected_value(error: ErrorDetails) -> str:
    """Describe the values that pydantic accepts in the place of an error."""
    if choices := _list_choices(error):
        return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
    if error["type"] in _EXPECTED_VALUES:
        return _EXPECTED_VALUES[error["type"]].format_map(error.get("ctx", {}))
    return error["msg"].removeprefix("Value error, ").removesuffix(".")


def _list_choices(error: ErrorDetails) -> list[str]:
    """List the values of a Literal type; empty if the error is another."""
    if error["type"] == "literal_error":
        listing = str(error["ctx"]["expected"])
    else:
        _, _, listing = error["msg"].partition(" is not one of ")  # typer's check of an option
    return [name.strip("' ") for name in re.split(r", | or ", listing.removesuffix("."))] if listing else []


def _describe_config_error(config_class: type[BaseModel], error: ErrorDetails) -> str:
    key_path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *sections, key = map(str, error["loc"])
        model = ViewsConfig if sections == ["views"] else config_class
        return "".join(f"{section}: " for section in sections) + unknown_name_message("key", key, model.model_fields)
    if error["type"] == "missing":
        return f"{key_path} must be given."
    if not error["loc"]:  # a check of several keys, with a sentence of its own
        return error["msg"].removeprefix("Value error, ").removesuffix(".") + "."
    return f"{key_path}: {describe_value_error(error)}"


def _find_converted_boolean(content: Any, values: Any, path: str = "") -> str | None:
    """Find a `true` or `false` that the validation converted to a number.

    Args:
        content: content before the validation.
        values: content after it.
        path: dotted path of the content.

    Returns:
        Dotted path of the first one; None if there is none.
    """
    if isinstance(content, bool):
        return None if isinstance(values, bool) else path
    pairs: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(content, Mapping) and isinstance(values, BaseModel):
        pairs = ((key, item, getattr(values, key, item)) for key, item in content.items() if isinstance(key, str))
    elif isinstance(content, Mapping) and isinstance(values, Mapping):
        pairs = ((key, item, values.get(key, item)) for key, item in content.items())
    elif isinstance(content, list | tuple) and isinstance(values, list | tuple) and len(content) == len(values):
        pairs = zip(range(len(content)), content, values, strict=True)
    matches = (
        _find_converted_boolean(item, value, f"{path}.{key}" if path else str(key)) for key, item, value in pairs
    )
    return next((match for match in matches if match is not None), None)


def _describe_boolean(path: str) -> str:
    return f"{path}: expected a number, got true or false."


def _describe_option_error(option_path: str, value: Any, errors: Sequence[ErrorDetails]) -> str:
    """Describe the errors of an option; the first item that does not fit, or all alternatives of a union."""
    first = errors[0]
    if len(errors) == 1 or all(isinstance(part, int) for error in errors for part in error["loc"]):
        items = [str(part) for part in first["loc"] if isinstance(part, int)]
        return f"{'.'.join([option_path, *items])}: {describe_value_error(first)}"
    expected_values = dict.fromkeys(_describe_expected_value(error) for error in errors)
    return f"{option_path}: expected {' or '.join(expected_values)}, got {value!r}."


_EXPECTED_VALUES = {  # pydantic error type: the expected value, with the fields of its context
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "text of the form {pattern}",
    "greater_than": "a number above {gt:.10g}",
    "greater_than_equal": "a number of at least {ge:.10g}",
    "less_than": "a number below {lt:.10g}",
    "less_than_equal": "a number of at most {le:.10g}",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "none_required": "null",
    "too_short": "a list of length {min_length} or more",
    "too_long": "a list of length {max_length} or less",
    "missing": "another item",
}
