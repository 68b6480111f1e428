"""Images and random seeds of each step: a pure function of the run seed and the step.

No generator state is carried from step to step. A resumed run, a run with another number of data-loading workers and a
replayed step therefore use the same bytes.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from medim.data.parallel import block_interrupts_of_workers, exit_with_parent
from medim.signals import SIGNAL_NAMES
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup

SampleItem = tuple[int, int]  # (index of the image, seed of its randomness)


def derive_seed(*parts: int) -> int:
    """Derive a 32-bit seed from several integers."""
    return int(np.random.SeedSequence((len(parts), *parts)).generate_state(1)[0])


class StepSampler(Sampler[list[SampleItem]]):
    """Sampler of one batch per step, with one scan per subject in a batch.

    The subjects are shuffled in each epoch; subjects that do not fill a whole batch at the end of an epoch are left
    out. For a subject with several scans, one is drawn at random. If there are fewer subjects than images per batch,
    subjects repeat within a batch.

    Several processes share each batch: each process takes an equal range of its slots. The image and the seed of a slot
    do not depend on the process.

    Args:
        subjects: subject of each image; or the class of each image, for batches with equally many images of each
            class.
        batch_size: images per batch.
        steps: total number of batches.
        seed: random seed of the run.
        start: number of steps already done, which a resumed run skips.
        group: the processes of the run; batch_size is a multiple of their number.
    """

    def __init__(
        self,
        subjects: Sequence[str],
        *,
        batch_size: int,
        steps: int,
        seed: int,
        start: int = 0,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        group.check_batch(batch_size)
        scans: dict[str, list[int]] = {}
        for image, subject in enumerate(subjects):
            scans.setdefault(subject, []).append(image)
        self._scans = list(scans.values())
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed
        self._start = start
        n_per_process = batch_size // group.count
        self._slots = slice(group.rank * n_per_process, (group.rank + 1) * n_per_process)

    def __len__(self) -> int:
        """Number of steps of the run, including those before `start`, because Lightning counts from the beginning."""
        return self._steps

    def __iter__(self) -> Iterator[list[SampleItem]]:
        """Yield the part of this process of each batch, beginning with step `start`."""
        for step in range(self._start, self._steps):
            yield self.batch(step)[self._slots]

    def batch(self, step: int) -> list[SampleItem]:
        """Draw the images of one step with their seeds, for all processes."""
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


def prepare_worker(worker: int) -> None:
    """Ignore stop signals in a data-loading worker, because the main process handles them, and end with that process.

    PyTorch's own check watches the parent process, which is the fork server, and that stays as long as its workers.
    """
    exit_with_parent()
    for name in SIGNAL_NAMES:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def step_loader(dataset: Dataset[Any], sampler: StepSampler, *, workers: int, prefetch: int = 2) -> DataLoader[Any]:
    """Build a data loader with the batches of a sampler.

    Args:
        dataset: dataset with (index, seed) as item key.
        sampler: sampler of lists of such items.
        workers: number of data-loading workers.
        prefetch: number of batches that each worker prepares in advance.
    """
    if workers:
        with block_interrupts_of_workers():  # inherited by the workers of the server
            forkserver.ensure_running()
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=prepare_worker if workers else None,
    )
