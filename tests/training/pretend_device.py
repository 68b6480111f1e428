"""A step of small and fine-tuning presets on a device that is not there: `python -m tests.training.pretend_device OUT`.

PyTorch's fake tensors know shape, type and device but hold nothing, and refuse to mix devices. A build without CUDA
lacks two things that they need: a guard of the device, which one written in Python takes the place of, and streams for
the way back. So the losses are computed on `cuda`, and the whole step (losses, both ways back, clipping, optimisers) on
`pretend`, PyTorch's place for devices of others. Both happen in a process of their own, since nothing undoes them.
"""

from __future__ import annotations

import ctypes
import json
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from monai.losses import dice
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

from medim.config import PretrainConfig, list_presets, load_config
from medim.objectives import contrastive_term, coordinates, dense, occlusion, reconstruction
from medim.training.engine.process_group import SINGLE_PROCESS
from medim.training.pretrain.run import _build_module
from tests.specs import make_spec
from tests.training.one_step import BATCH, _build_finetuning, build_targets, list_cases

SMALL = [name for name in list_presets("pretrain") if name.startswith("test-")]
OTHERS, FAULTY = " with drawn negatives and occlusion", " with a tensor left behind"
FINETUNING = [case for case in list_cases() if case.startswith("finetune ")]
CASES = [*SMALL, *(f"test-{n}d-local-dim{OTHERS}" for n in (2, 3)), f"test-2d-coordinates{FAULTY}", *FINETUNING]
DEVICES = ("cuda", "pretend")


class _Guard(torch._C._acc.DeviceGuard):
    """Says which device is in use: always the first, and always this kind."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self._kind = kind

    def type_(self) -> Any:
        return self._kind


class _Backend(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Strict(TorchFunctionMode):
    """Refuses an index on another device, which PyTorch would move by itself and wait for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in {"__getitem__", "__setitem__"}:
            tensor, index = args[:2]
            for part in index if isinstance(index, tuple) else (index,):
                if isinstance(part, torch.Tensor) and part.ndim and part.device != tensor.device:
                    raise RuntimeError(f"a tensor on {tensor.device} indexed by one on {part.device}")
        return func(*args, **(kwargs or {}))


def pretend(device: str) -> list[Any]:
    """Make PyTorch believe in a device; what is returned must be kept."""
    kinds = torch._C._autograd.DeviceType
    guard = _Guard(kinds.CUDA if device == "cuda" else kinds.PrivateUse1)
    backend_registration._setup_privateuseone_for_python_backend(
        "pretend", backend_module=_Backend(), device_guard=guard
    )
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 24).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if device == "cuda":
        guards[1] = guards[20]  # of CUDA, and of PrivateUse1
    return [guard, library]


def move(module: nn.Module, device: str) -> None:
    """Fake parameters and buffers on a device; a tensor that a module keeps elsewhere stays where it is."""
    for part in module.modules():
        for name, held in part._parameters.items():
            if held is not None:
                fake = torch.empty(held.shape, dtype=held.dtype, device=device)
                part._parameters[name] = nn.Parameter(fake, requires_grad=held.requires_grad)
        for name, held in part._buffers.items():
            if held is not None:
                part._buffers[name] = torch.empty(held.shape, dtype=held.dtype, device=device)


def batch_of(config: PretrainConfig, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of a configuration."""
    views = (config.batch_size, config.views.count)
    image = torch.empty(*views, 1, *config.views.shape, device=device)
    return image, torch.empty(*views, config.spatial_dims, device=device)


def hidden(count: int, shape: tuple[int, ...], *_: Any) -> torch.Tensor:
    """What is drawn on the CPU number by number, which fake tensors do not hold."""
    return torch.empty(count, 1, *shape, dtype=torch.bool)


def level(scores: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """A chance level, which is a number: from a mask on the device it would wait for the device."""
    if mask is not None and mask.device.type != "cpu":
        raise RuntimeError(f"the chance level waits for {mask.device}")
    return 1.0


class AxisNumbers:
    """PyTorch for the Dice loss of MONAI, which lists axes by a tensor on the CPU that fake tensors do not hold."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def arange(*bounds: int) -> Any:
        """Numbers of axes, as a list."""
        return SimpleNamespace(tolist=lambda: list(range(*bounds)))


def left_behind(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`medim.objectives.coordinates._gather_locations`, but for the move to the device."""
    return flat.gather(1, index.unsqueeze(-1).expand(-1, -1, flat.shape[2]))


def step(name: str, device: str) -> list[str]:
    """Take the step of a preset (on `cuda` its losses alone); the devices of what was computed."""
    config = load_config("pretrain", name.split(" ")[0])
    assert isinstance(config, PretrainConfig)
    if name.endswith(OTHERS):
        objective = {**config.objectives[0], "negatives": "permuted", "occlusion": 4}
        config = config.model_copy(update={"objectives": [objective]})
    shape = list(config.views.shape)
    sizes = {"in_channels": 1, "spatial_dims": config.spatial_dims, "input_shape": shape}
    spec = make_spec({"encoder": config.encoder, **sizes})
    module: Any = _build_module(config, spec, 0, SINGLE_PROCESS)
    kind = f"{device}:0"
    with FakeTensorMode(), Strict():
        move(module, kind)
        batch = batch_of(config, kind)
        if device == "cuda":
            views, encode = module._prepare_views(batch, 0, split=0)
            return [str(term.loss.device) for term in module._compute_terms(encode, views).values()]
        (main, *adversary), (schedule,) = module.configure_optimizers()
        module.optimizers = lambda **_: [main, *(SimpleNamespace(optimizer=o) for o in adversary)]
        module.lr_schedulers = lambda: schedule
        module.manual_backward = lambda loss: loss.backward()
        module._trainer = SimpleNamespace(global_step=0, precision_plugin=SimpleNamespace())
        terms = module.training_step(batch, 0)
        norms = terms.pop("gradient_norms")
        assert not any(p.grad is None for o in adversary for group in o.param_groups for p in group["params"])
        gradients = [p.grad for p in module.encoder.parameters() if p.grad is not None]
        return [str(tensor.device) for tensor in [*(t.loss for t in terms.values()), *norms.values(), *gradients]]


def finetune_step(case: str, device: str) -> list[str]:
    """Take the step of a fine-tuning preset (on `cuda` its loss alone); the devices of what was computed."""
    run = _build_finetuning(case.removeprefix("finetune "), Path(), {})
    kind = f"{device}:0"
    targets = build_targets(run.config)
    with FakeTensorMode(), Strict():
        move(run.module, kind)
        image = torch.empty(BATCH, 1, *run.config.views.shape, device=kind)
        model = run.module.model
        target = torch.empty(targets.shape, dtype=targets.dtype, device=kind)
        loss = model.head.loss(model(image), target)
        if device == "cuda":
            return [str(loss.device)]
        (optimiser,), _ = run.module.configure_optimizers()
        loss.backward()
        run.module._trainer = SimpleNamespace(precision_plugin=SimpleNamespace())
        run.module.on_before_optimizer_step(optimiser)
        optimiser.step()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [str(tensor.device) for tensor in (loss, *gradients)]


def main(device: str, out: Path) -> None:
    """Write, for each preset, the devices that were met, or the error."""
    kept, found = pretend(device), {}
    for name in CASES:
        try:
            with ExitStack() as patches:
                for module in (dense, reconstruction):
                    patches.enter_context(patch.object(module, "draw_cube_mask", hidden))
                patches.enter_context(patch.object(occlusion, "draw_occlusion_mask", hidden))
                patches.enter_context(patch.object(contrastive_term, "compute_chance", level))
                patches.enter_context(patch.object(dice, "torch", AxisNumbers()))
                if name.endswith(FAULTY):
                    patches.enter_context(patch.object(coordinates, "_gather_locations", left_behind))
                take = finetune_step if name in FINETUNING else step
                found[name] = sorted(set(take(name, device)))
        except Exception:
            found[name] = traceback.format_exc().splitlines()[-12:]
    out.write_text(json.dumps(found))
    del kept


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))
