"""Which images a step sees, and with which random numbers: a pure function of run seed and step.

Nothing is drawn from a running state, so a resumed run, a run with other loading processes and a replayed step see
the same bytes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medim.signals import SIGNAL_NAMES
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup

SampleItem = tuple[int, int]  # (index of the image, seed of its randomness)


def derive_seed(*parts: int) -> int:
    """One 32-bit seed from several integers."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0])


class StepSampler(Sampler[list[SampleItem]]):
    """One batch a step, and one scan of a subject in a batch.

    Subjects are shuffled anew each epoch, which leaves those over that fill no batch; a subject's scan is drawn at
    random. Where there are fewer subjects than a
    batch needs, batches are filled by going round the subjects again.

    Several processes share each batch: every one takes an equal run of its slots, and a slot has its image and seed
    whoever takes it.

    Args:
        subjects: the subject of each image.
        batch_size: images a batch.
        steps: batches in all.
        seed: of the run.
        start: steps already taken, which a resumed run leaves out.
        ranks: the processes; batch_size is a multiple of their number.
    """

    def __init__(
        self,
        subjects: Sequence[str],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        start: int = 0,
        ranks: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        ranks.check_batch(batch_size)
        scans: dict[str, list[int]] = {}
        for image, subject in enumerate(subjects):
            scans.setdefault(subject, []).append(image)
        self._scans = list(scans.values())
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed
        self._start = start
        n_per_process = batch_size // ranks.count
        self._slots = slice(ranks.rank * n_per_process, (ranks.rank + 1) * n_per_process)

    def __len__(self) -> int:
        """All steps of the run, those before `start` included: Lightning counts from the run's beginning."""
        return self._steps

    def __iter__(self) -> Iterator[list[SampleItem]]:
        """Yield this process's part of the batches from `start` on."""
        for step in range(self._start, self._steps):
            yield self.batch(step)[self._slots]

    def batch(self, step: int) -> list[SampleItem]:
        """The images of one step, each with its seed; those of all processes."""
        rng = np.random.default_rng(derive_seed(self._seed, step))
        scans_by_slot = [self._scans[subject] for subject in self._draw_subjects(step)]
        return [
            (int(rng.choice(scans)), derive_seed(self._seed, step, slot)) for slot, scans in enumerate(scans_by_slot)
        ]

    def _draw_subjects(self, step: int) -> list[int]:
        count, size = len(self._scans), self._batch_size
        if count < size:
            order = np.concatenate([self._shuffle_subjects(step, turn) for turn in range(-(-size // count))])
            return [int(s) for s in order[:size]]
        epoch, position = divmod(step, count // size)
        return [int(s) for s in self._shuffle_subjects(epoch, 0)[position * size : (position + 1) * size]]

    def _shuffle_subjects(self, epoch: int, turn: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng(derive_seed(self._seed, epoch, turn, 1)).permutation(len(self._scans))


def ignore_signals(worker: int) -> None:
    """Leave it to the run to answer signals that SLURM sends to every process of it."""
    for name in SIGNAL_NAMES:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def step_loader(dataset: Dataset[Any], sampler: StepSampler, *, workers: int, prefetch: int = 2) -> DataLoader[Any]:
    """A loader whose batches are the sampler's.

    Args:
        dataset: takes (index, seed) items.
        sampler: yields lists of such items.
        workers: loading processes.
        prefetch: batches that each of them has ready ahead.
    """
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=ignore_signals if workers else None,
    )
