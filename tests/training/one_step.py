"""One training step of every shipped preset on the CPU, as on a GPU: a fused optimiser, each precision.

`python -m tests.training.one_step` prints the operations of each preset that differ from preset to preset.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import medim.training.finetune.run as finetuning
import medim.training.pretrain.run as pretraining
from medim.config import Command, RunConfig, Section, check_config, list_presets, read_config
from medim.model_spec import ModelSpec
from medim.models.model import build_model
from medim.training.auto_config import resolve_auto
from medim.training.engine import optim
from medim.training.engine.process_group import SINGLE_PROCESS
from medim.training.finetune.module import FinetuneModule
from medim.training.finetune.options import FinetuneOptions
from medim.training.finetune.targets import task_of_config
from medim.training.pretrain.history import MetricHistory
from medim.training.pretrain.options import PretrainOptions
from tests.specs import make_spec

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SCALE = 2.0**16  # first scale of the gradients in `16-mixed`, as on a GPU
BATCH, CLASSES = 4, ("one", "two", "three")
# Shape and spacing of the median image, for `auto`.
SIZES = {"mri": ((24, 24, 24), (1.0, 1.0, 1.0)), "xray": ((48, 48), (1.0, 1.0))}
# Largest widths; groups of `gn` need multiples of four. `width` of the encoder of AMDIM is multiplied by up to eight.
WIDTHS = {
    "channels": 8,
    "decoder_channels": 8,
    "hidden": 8,
    "reduce": 8,
    "width": 8,
    "summary_channels": 8,
    "blocks": 1,
}
U_NET_SIDE = 16  # largest side of the views of a U-Net, which takes any
FINDINGS = " with findings"
VARIANTS: dict[str, Section] = {  # options of `local_dim` that no preset has
    " with occlusion": {"occlusion": 4},
    " with permuted negatives": {"negatives": "permuted"},
    " with rolled negatives": {"negatives": "rolled"},
    " with dv": {"estimator": "dv"},
    " with jsd": {"estimator": "jsd"},
    " with foreground": {"foreground": 0.25},
    " with concat_and_convolve": {"critic": {"name": "concat_and_convolve", "hidden": [8]}},
    " with batch norms": {
        "critic": {"name": "encode_and_dot", "width": 8, "local_norm": "batch", "summary_norm": "batch"}
    },
}
HEAD_VARIANTS: dict[str, Section] = {  # presets of `finetune`, and options of the head that no preset has
    "mri-demo-segmentation with dice of each image": {"dice": "image"},
    "mri-demo-segmentation with class weights": {"class_weights": [0.1, 1.0, 1.5, 1.4]},
    "mri-demo-segmentation with focal loss": {"focal_gamma": 2.0},
    "xray-28-classification with class weights": {"class_weights": [0.5, 1.0, 1.5]},
    "xray-28-classification with focal loss": {"focal_gamma": 0.5},
}
CHUNKS = " in chunks"  # of two images


def list_cases() -> list[str]:
    """List the presets of both commands, and variants with options that no preset has."""
    pretrain = [f"pretrain {name}" for name in list_presets("pretrain")]
    finetune = [f"finetune {name}" for name in list_presets("finetune")]
    variants = [f"finetune {name}{FINDINGS}" for name in ("xray-28-classification", "mri-crop-classification")]
    small = [f"pretrain test-{dims}d-local-dim{variant}" for dims in (2, 3) for variant in VARIANTS]
    variants += [f"finetune {name}" for name in HEAD_VARIANTS]
    return [*pretrain, *small, f"pretrain mri-demo{CHUNKS}", *finetune, *variants]


@dataclass(frozen=True)
class Step:
    """Result of a training step.

    Attributes:
        operations: names of the operations of the step, with their arguments by name.
        start: parameters of the module before the step, by name.
        weights: parameters of the module after the step, by name.
        norms: norms of the gradients that the module measured, by part; empty in fine-tuning.
        scale: scale of the gradients after the step; 0 without a scaler.
    """

    operations: tuple[tuple[str, dict[str, Any]], ...]
    start: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    norms: dict[str, float]
    scale: float


class RecordOperations(TorchDispatchMode):
    """Records the operations below autograd, which are those that a device runs."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[tuple[Any, ...], tuple[str, dict[str, Any]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        arguments = {k: _describe(v) for k, v in {**dict(zip(names, args, strict=False)), **kwargs}.items()}
        name = str(func).removeprefix("aten.")
        self.operations.setdefault((name, str(arguments)), (name, arguments))
        return func(*args, **kwargs)


def _describe(value: Any) -> Any:
    """Keep numbers and words, and of a tensor its dtype."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def load_small(command: Command, preset: str, **changes: Any) -> Any:
    """Load a preset with narrow networks, a batch of four and one step."""
    content = read_config(command, preset)
    content = resolve_auto(content, *SIZES[content["modality"]])
    content = _narrow(content)
    if content["encoder"]["name"] == "unet":
        content["views"] = {**content["views"], "shape": [min(side, U_NET_SIDE) for side in content["views"]["shape"]]}
    short = {"max_steps": 1, "warmup_steps": 0, "batch_size": BATCH, "checkpoint_every_steps": 1, "workers": 0}
    short["precision"] = "32-true"  # `pretend_gpu` sets that of the step
    if content["encoder"]["name"] == "amdim":
        content["encoder"] = {**content["encoder"], "width": 4, "summary_channels": 32, "depth": 2}
    return check_config(command, {**content, **short, **changes}, source=preset)


def _narrow(value: Any) -> Any:
    if isinstance(value, list):
        return [_narrow(item) for item in value]
    if not isinstance(value, dict):
        return value
    narrow = {key: _limit(item, WIDTHS[key]) if key in WIDTHS else _narrow(item) for key, item in value.items()}
    return {**narrow, "widths": [8] * len(narrow["blocks"])} if narrow.get("name") == "resnet" else narrow


def _limit(value: Any, limit: int) -> Any:
    return [min(item, limit) for item in value] if isinstance(value, list) else min(value, limit)


@cache
def take_step(
    case: str, precision: Precision = "32-true", *, scale: float = SCALE, sgd: bool = False, **changes: Any
) -> Step:
    """Take one training step of a preset through the trainer.

    Args:
        case: a name of `list_cases`.
        precision: precision of the step; see `pretend_gpu`.
        scale: first scale of the gradients in `16-mixed`.
        sgd: take the fused SGD instead of the optimiser of the preset.
        **changes: keys of the configuration.
    """
    command, name = case.split(" ", 1)
    build, train = (_build_pretraining, _pretrain) if command == "pretrain" else (_build_finetuning, _finetune)
    with tempfile.TemporaryDirectory() as folder, pretend_gpu(precision, scale, sgd):
        run = build(name, Path(folder), changes)
        start = _copy_weights(run.module)
        with RecordOperations() as record:
            train(run)
        norms = {part: float(norm) for part, norm in getattr(run.module, "_gradient_norms", {}).items()}
        scaler = getattr(run.module.trainer.precision_plugin, "scaler", None)
        final_scale = scaler.get_scale() if scaler else 0.0
        operations, weights = tuple(record.operations.values()), _copy_weights(run.module)
        return Step(operations, start, weights, norms, final_scale)


def _copy_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@contextmanager
def pretend_gpu(precision: Precision, scale: float = SCALE, sgd: bool = False) -> Iterator[None]:
    """Build optimisers and trainers as on a GPU: fused, and in the precision of the configuration.

    bf16 runs without oneDNN, whose 3D convolutions in bf16 are not reliable. `16-mixed` computes in fp32 with the
    gradient scaler of fp16. Its scale is a power of two, so that the step must be that of fp32 to the last bit.
    """
    fused: dict[str, Any] = {
        name: _build_sgd if sgd else optimiser if name == "radam" else partial(_build_fused, optimiser)
        for name, optimiser in optim.OPTIMISERS.items()
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(optim.OPTIMISERS, fused))
        for module in (pretraining, finetuning):
            stack.enter_context(
                patch.object(module, "make_trainer", partial(_make_trainer, module.make_trainer, precision, scale))
            )
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        if precision == "bf16-mixed":
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
        yield


def _build_fused(optimiser: Callable[..., Any], groups: Any, **options: Any) -> Any:
    return optimiser(groups, **{**options, "fused": True})


def _build_sgd(groups: Any, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(groups, lr=options["lr"], fused=True)


def _make_trainer(
    make: Callable[..., pl.Trainer], precision: Precision, scale: float, *args: Any, **options: Any
) -> pl.Trainer:
    trainer = make(*args, **options)
    if precision == "bf16-mixed":
        trainer.strategy.precision_plugin = MixedPrecision("bf16-mixed", "cpu")
    elif precision == "16-mixed":
        trainer.strategy.precision_plugin = _ScalerAlone(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale)
        )
    return trainer


class _ScalerAlone(MixedPrecision):
    """The gradient scaler of mixed precision, without its arithmetic."""

    def autocast_context_manager(self) -> Any:
        return nullcontext()


def _build_pretraining(name: str, out: Path, changes: Section) -> Any:
    preset, _, variant = name.partition(" ")
    config = load_small("pretrain", preset, **changes)
    if f" {variant}" == CHUNKS:
        config = config.model_copy(update={"gradient_cache_chunk": 2})
    elif variant:
        config = config.model_copy(update={"objectives": [{**config.objectives[0], **VARIANTS[f" {variant}"]}]})
    torch.manual_seed(0)
    module = pretraining._build_module(config, _build_spec(config), 0, SINGLE_PROCESS)
    return SimpleNamespace(
        config=config,
        options=PretrainOptions(accelerator="cpu"),
        out=out,
        group=SINGLE_PROCESS,
        cohort=SimpleNamespace(records=lambda split: ()),
        module=module,
        history=MetricHistory(),
    )


def _pretrain(run: Any) -> None:
    views, dims = run.config.views, run.config.spatial_dims
    batch = torch.randn(BATCH, views.count, 1, *views.shape), torch.rand(BATCH, views.count, dims)
    with (
        patch.object(pretraining, "_build_train_loader", lambda *_, **__: DataLoader([batch], batch_size=None)),
        patch.object(pretraining, "_build_val_loader", lambda *_, **__: None),
    ):
        pretraining._train(run, None, None, 0)


def _build_finetuning(name: str, out: Path, changes: Section) -> Any:
    preset, _, variant = name.partition(" ")
    if variant:
        content = read_config("finetune", preset)
        options = {"name": "multi_label"} if f" {variant}" == FINDINGS else HEAD_VARIANTS[name]
        changes = {**changes, "head": {**content["head"], **options}}
    if name in HEAD_VARIANTS and content["task"] == "segmentation":
        changes = {**changes, "views": {**content["views"], "shape": [16, 8, 8]}}  # no other case is as slow in bf16
    config = load_small("finetune", preset, **changes)
    torch.manual_seed(0)
    spec = _build_spec(config)
    return SimpleNamespace(
        config=config,
        options=FinetuneOptions(accelerator="cpu"),
        out=out,
        data=SimpleNamespace(cohort=SimpleNamespace(index=None), train=(), val=()),
        spec=spec,
        module=FinetuneModule(build_model(spec), config),
    )


def _finetune(run: Any) -> None:
    batch = torch.randn(BATCH, 1, *run.config.views.shape), build_targets(run.config)
    with patch.object(finetuning, "build_finetune_loader", lambda *_, **__: DataLoader([batch], batch_size=None)):
        finetuning._train(run, None, 0)


def _build_spec(config: RunConfig) -> ModelSpec:
    classes = CLASSES[:1] if getattr(config, "task", None) == "regression" else CLASSES
    content = {"encoder": config.encoder, "spatial_dims": config.spatial_dims, "in_channels": 1, "classes": classes}
    parts = {key: getattr(config, key) for key in ("decoder", "head") if hasattr(config, key)}
    count = task_of_config(config).count_outputs(classes) if hasattr(config, "task") else None
    return make_spec({**content, **parts, "input_shape": list(config.views.shape), "out_channels": count})


def build_targets(config: Any) -> torch.Tensor:
    """Draw targets of a fine-tuning: a mask, classes, findings of which one is unknown, or numbers."""
    task = task_of_config(config)
    blank = torch.tensor(task.make_blank_targets(BATCH, config.views.shape))
    if not blank.is_floating_point():
        return torch.randint(0, len(CLASSES), blank.shape)
    if task.name == "regression":
        return torch.randn(BATCH, 1, dtype=blank.dtype)
    findings = torch.randint(0, 2, (BATCH, len(CLASSES))).to(blank.dtype)
    findings[0, 0] = math.nan
    return findings


def main() -> None:
    """Print the operations of each preset that are not in every preset."""
    logging.disable(logging.INFO)
    operations = {case: {name.partition(".")[0] for name, _ in take_step(case).operations} for case in list_cases()}
    common = set.intersection(*operations.values())
    print(f"in all {len(operations)} presets: {', '.join(sorted(common))}")
    for case, names in operations.items():
        print(f"{case} ({len(names)}): {', '.join(sorted(names - common))}")


if __name__ == "__main__":
    main()
