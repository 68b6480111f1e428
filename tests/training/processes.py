"""Twenty steps of every objective in one process, or in one of two: `python -m tests.training.processes RANK PORT OUT`.

The classes and functions here are shared by both sides of `test_two_processes.py`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from medim.config import PretrainConfig, check_config, load_config
from medim.objectives import Term
from medim.training.engine import process_group as training_ranks
from medim.training.engine.launch import launched, planned_group, trainer_options
from medim.training.engine.optim import build_optimiser
from medim.training.engine.process_group import ProcessGroup
from medim.training.engine.sampler import StepSampler, step_loader
from medim.training.pretrain import module as training_module
from medim.training.pretrain.config import has_unused_parameters
from medim.training.pretrain.run import _build_module
from tests.specs import make_spec

STEPS, BATCH, SHAPE = 20, 8, (16, 16)
DOT = {"name": "encode_and_dot", "width": 16, "scale_scores": True}
PAIR = {"name": "concat_and_convolve", "hidden": [16]}
UNET: dict[str, Any] = {
    "encoder": {"name": "unet", "channels": [4, 8], "norm": "in", "summary_channels": 8},
    "decoder": {"name": "unet", "norm": "in"},
}
PATCHES: dict[str, Any] = {
    "encoder": {
        "name": "patches",
        "patch": 4,
        "encoder": {"name": "convnet", "channels": [8], "kernel_size": 3, "norm": "gn", "hidden": 0},
    }
}
CASES: dict[str, dict[str, Any]] = {
    "infonce": {
        "objectives": [{"name": "local_dim", "estimator": "infonce", "critic": DOT, "batch_norm_summary": True}]
    },
    "jsd": {"objectives": [{"name": "local_dim", "estimator": "jsd", "critic": DOT, "occlusion": 4}]},
    "dv": {"objectives": [{"name": "local_dim", "estimator": "dv", "critic": DOT, "score_penalty": 0.04}]},
    "permuted": {"objectives": [{"name": "local_dim", "negatives": "permuted", "critic": DOT, "foreground": 0.1}]},
    "rolled": {"objectives": [{"name": "global_dim", "negatives": "rolled", "critic": PAIR}]},
    "local and global": {
        "views": 2,
        "objectives": [
            {"name": "local_dim", "estimator": "infonce", "critic": {"name": "bilinear"}},
            {"name": "global_dim", "estimator": "infonce", "critic": DOT, "weight": 0.5},
        ],
    },
    "prior": {
        "objectives": [
            {"name": "local_dim", "estimator": "infonce", "critic": DOT},
            {"name": "prior_matching", "hidden": [8]},
        ]
    },
    "prior alone": {"objectives": [{"name": "prior_matching", "hidden": [8], "prior": "gaussian"}]},
    "simclr": {"views": 2, "objectives": [{"name": "simclr", "width": 8}]},
    "amdim": {"views": 2, "objectives": [{"name": "amdim", "width": 8}]},
    "cpc": {**PATCHES, "objectives": [{"name": "cpc", "steps": 1, "layers": 1, "scale_scores": True}]},
    "some of cpc": {**PATCHES, "objectives": [{"name": "cpc", "steps": 1, "layers": 1, "negatives": 7}]},
    "dense": {
        **UNET,
        "objectives": [{"name": "dense_dim", "width": 8, "points": 16, "mask_patch_size": 4, "negatives": "all"}],
    },
    "dense with two views": {
        **UNET,
        "views": 2,
        "objectives": [
            {"name": "dense_dim", "width": 8, "points": 16, "mask_patch_size": 4, "negatives": "other_images"}
        ],
    },
    "reconstruction": {
        **UNET,
        "objectives": [
            {"name": "reconstruction", "mask_patch_size": 4},
            {"name": "local_dim", "estimator": "infonce", "critic": DOT},
            {"name": "coordinates", "kind": "relative", "hidden": 8, "points": 4},
        ],
    },
    "vae": {"objectives": [{"name": "vae", "decoder_channels": [8, 8], "norm": "gn"}]},
}
FAULTS = ("dropped", "mis-scaled", "detached")


class Noise(Dataset[Any]):
    """Images and places that follow from the item's seed."""

    def __init__(self, count: int, shape: Sequence[int]) -> None:
        self._count, self._shape = count, tuple(shape)

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        image, seed = item
        subject, view = (torch.Generator().manual_seed(n) for n in (image, seed))
        body = torch.randn(1, 1, *self._shape, generator=subject)
        image = body + 0.3 * torch.randn(self._count, 1, *self._shape, generator=view)
        return image, torch.zeros(self._count, len(self._shape))


def config_of(case: str) -> PretrainConfig:
    """The configuration of a case."""
    options = dict(CASES[case])
    views = {"shape": list(SHAPE), "count": options.pop("views", 1)}
    encoder = {"name": "convnet", "channels": [8, 8], "kernel_size": 3, "norm": "gn", "hidden": 0}
    encoder |= {"summary": "mean_max", "summary_channels": 8}
    run = {"modality": "xray", "preprocessing": [], "max_steps": STEPS, "batch_size": BATCH, "lr": 0.1}
    config = check_config("pretrain", {"views": views, "encoder": encoder, **run, **options}, source=case)
    assert isinstance(config, PretrainConfig)
    return config


def descent(groups: Any, *, lr: float, max_steps: int, **_: Any) -> Any:
    """SGD: a step in proportion to the gradient, where Adam's is of one size and turns rounding of 0 into a sign."""
    made = SGD([p for module, _ in groups for p in module.parameters()], lr=lr, momentum=0.5)
    return made, LambdaLR(made, lambda _: 1.0)


def adamw(groups: Any, **options: Any) -> Any:
    """What runs use, at a rate that is common for it."""
    return build_optimiser(groups, **{**options, "lr": 1e-3})


def trained(case: str, group: ProcessGroup, *, by: Any = descent) -> dict[str, dict[str, torch.Tensor]]:
    """Parameters and buffers before and after the steps of a case, and the losses of the last one."""
    return train(config_of(case), group, by)


def trained_in_float64(group: ProcessGroup, *, by: Any = descent) -> dict[str, dict[str, torch.Tensor]]:
    """The same for small views of the preset `mri-crop`, with all arithmetic in float64."""
    short = ["batch_size=8", "max_steps=8", "warmup_steps=0", "precision=32-true", "views.shape=[16, 16, 16]"]
    config, before = load_config("pretrain", "mri-crop", short), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch.Tensor, "float", torch.Tensor.double):  # scores are fp32 otherwise
            return train(config.model_copy(update={"lr": 0.05 if by is descent else config.lr}), group, by)
    finally:
        torch.set_default_dtype(before)


def train(config: PretrainConfig, group: ProcessGroup, by: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Train on noise; see `trained`."""
    sizes = {"in_channels": 1, "spatial_dims": config.spatial_dims, "input_shape": list(config.views.shape)}
    spec = make_spec({"encoder": config.encoder, **sizes})
    torch.manual_seed(0)
    losses: dict[str, torch.Tensor] = {}
    with patch.object(training_module, "build_optimiser", by):
        module = _build_module(config, spec, 0, group)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        steps, subjects = config.max_steps, [str(n) for n in range(12)]
        sampler = StepSampler(subjects, batch_size=BATCH, steps=steps, seed=0, group=group)
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = pl.Trainer(
            max_steps=steps,
            **trainer_options("cpu", group, find_unused=group.count > 1 and has_unused_parameters(config)),
            **quiet,
            callbacks=[Keep(losses)],
            enable_model_summary=False,
            use_distributed_sampler=False,
            limit_val_batches=0,
        )
        trainer.fit(module, step_loader(Noise(config.views.count, config.views.shape), sampler, workers=0))
    return {"before": before, "after": dict(module.state_dict()), "losses": losses}


class Keep(pl.Callback):
    """Keeps the losses of the last step."""

    def __init__(self, losses: dict[str, torch.Tensor]) -> None:
        self._losses = losses

    def on_train_batch_end(self, *args: Any) -> None:
        """Note them."""
        self._losses.update({name: term.loss.detach() for name, term in args[2].items() if isinstance(term, Term)})


def fault(name: str) -> AbstractContextManager[Any]:
    """A gathering that is wrong on its way back."""
    gather = training_ranks._GatherFunction
    right = gather.backward

    def dropped(ctx: Any, gradient: torch.Tensor) -> Any:
        """What the others say of this part is lost."""
        return gradient[ctx.rank * ctx.each : (ctx.rank + 1) * ctx.each], None, None

    def scaled(ctx: Any, gradient: torch.Tensor) -> Any:
        return right(ctx, gradient * 2)[0], None, None

    def detached(ctx: Any, gradient: torch.Tensor) -> Any:
        return torch.zeros_like(gradient[: ctx.each]), None, None

    wrong = {"dropped": dropped, "mis-scaled": scaled, "detached": detached}[name]
    return patch.object(gather, "backward", staticmethod(wrong))


def main(out: Path) -> None:
    """Run every case, and one with each fault."""
    with launched("cpu", planned_group("cpu", 2, 1)) as group:
        for case in CASES:
            torch.save(trained(case, group), out / f"{case}-{group.rank}.pt")
        torch.save(trained("dv", group, by=adamw), out / f"adamw-{group.rank}.pt")
        for name, by in (("sgd", descent), ("adamw", build_optimiser)):
            torch.save(trained_in_float64(group, by=by), out / f"float64-{name}-{group.rank}.pt")
        for name in FAULTS:
            with fault(name):
                torch.save(trained("infonce", group), out / f"{name}-{group.rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank, port, folder = sys.argv[1:]
    os.environ.update(LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    main(Path(folder))
