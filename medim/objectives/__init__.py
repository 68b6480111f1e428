"""Pretraining objectives: modules that compute named losses from views of images.

To add an objective, write a module in this folder with a class that implements `Objective`, and add a line to
`OBJECTIVES` (`docs/how-to/add-objective.md`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from medim.objectives.amdim import AMDIM
from medim.objectives.coordinates import Coordinates
from medim.objectives.cpc import CPC
from medim.objectives.dense import DenseDIM
from medim.objectives.infomax import GlobalDIM, LocalDIM
from medim.objectives.objective import Encode, Objective, Term
from medim.objectives.prior_matching import PriorMatching
from medim.objectives.reconstruction import Reconstruction
from medim.objectives.simclr import SimCLR
from medim.objectives.vae import VAE, beta_vae

__all__ = ["OBJECTIVES", "Encode", "Objective", "Term"]

OBJECTIVES: dict[str, Callable[..., nn.Module]] = {
    "local_dim": LocalDIM,
    "global_dim": GlobalDIM,
    "coordinates": Coordinates,
    "prior_matching": PriorMatching,
    "reconstruction": Reconstruction,
    "cpc": CPC,
    "vae": VAE,
    "beta_vae": beta_vae,
    "dense_dim": DenseDIM,
    "amdim": AMDIM,
    "simclr": SimCLR,
}
