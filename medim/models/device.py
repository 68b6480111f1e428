"""Choice of the device of a network that is not trained."""

from __future__ import annotations

import torch

from medim.types import UserError


def choose_device(name: str = "auto") -> torch.device:
    """Choose a device of this machine.

    Args:
        name: auto (a GPU with CUDA if there is one), cpu, cuda, gpu (the same) or mps.

    Raises:
        UserError: the device is not available.
    """
    kind = "cuda" if name == "gpu" else name
    has_cuda = torch.cuda.is_available()
    if kind == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if (kind == "cuda" and not has_cuda) or (kind == "mps" and not torch.backends.mps.is_available()):
        raise UserError(f"--device {name}: not available on this machine. Run `medim doctor` to list the devices.")
    return torch.device(kind)
