"""Options of a pretraining run that the configuration does not contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Seeds, devices, and the handling of the output folder.

    Attributes:
        seed: random seed of weights, batches, crops, augmentation and objectives.
        split_seed: random seed of the split by subject.
        resume: continue from the newest checkpoint in the run's folder.
        overwrite: empty the run's folder first.
        accelerator: device kind, in the terms of Lightning.
        devices: processes per node, one per device; None: as many as torchrun or SLURM started, else one.
        nodes: machines; None: as many as torchrun or SLURM started, else one.
        stop_on_collapse: end a run that has diverged or collapsed, with that verdict.
        store: folder of preprocessed images; None: the user's cache.
        jobs: number of processes that preprocess images which are not in the store.
        fit_ood_detector: whether to fit an out-of-distribution detector for a package, see `medim.training.fit_ood`.
        callbacks: additional Lightning callbacks, such as a timer.
    """

    seed: int = 0
    split_seed: int = 0
    resume: bool = False
    overwrite: bool = False
    accelerator: str = "auto"
    devices: int | None = None
    nodes: int | None = None
    stop_on_collapse: bool = False
    store: Path | None = None
    jobs: int = 1
    fit_ood_detector: bool = True
    callbacks: Sequence[pl.Callback] = ()

    @property
    def seeds(self) -> dict[str, int]:
        """Both seeds by name."""
        return {"seed": self.seed, "split_seed": self.split_seed}
