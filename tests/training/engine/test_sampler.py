"""Batches are a pure function of seed and step: they can be resumed, replayed and loaded by anybody."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from medim.training.engine.sampler import StepSampler, derive_seed, step_loader

# Six subjects, two of them with several scans, in no particular order.
SUBJECTS = ["b", "a", "c", "a", "d", "e", "f", "a", "c"]


def sampler(subjects: list[str] = SUBJECTS, **options: Any) -> StepSampler:
    return StepSampler(subjects, **{"batch_size": 2, "steps": 60, "seed": 0, **options})


def subjects_of(batch: list[tuple[int, int]], subjects: list[str] = SUBJECTS) -> list[str]:
    return [subjects[image] for image, _ in batch]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_every_subject_comes_once_an_epoch_where_batches_divide_them(batch_size: int) -> None:
    batches = list(sampler(batch_size=batch_size))
    assert len(batches) == 60
    per_epoch = 6 // batch_size
    for epoch in range(60 // per_epoch):
        seen = [s for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for s in subjects_of(batch)]
        assert sorted(seen) == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("batch_size", [4, 5])
def test_where_they_do_not_divide_nobody_comes_twice_an_epoch_and_nobody_is_left_out_for_long(batch_size: int) -> None:
    seen = Counter(s for batch in sampler(batch_size=batch_size) for s in subjects_of(batch))
    assert set(seen) == set("abcdef")
    assert max(seen.values()) < 1.5 * min(seen.values())


def test_no_batch_holds_two_scans_of_a_subject_where_there_are_enough_subjects() -> None:
    for batch_size in range(1, 7):
        for batch in sampler(batch_size=batch_size):
            assert len(set(subjects_of(batch))) == batch_size


def test_a_batch_larger_than_the_subjects_goes_round_them_evenly() -> None:
    for batch in sampler(batch_size=15):
        counts = Counter(subjects_of(batch))
        assert set(counts) == set("abcdef")
        assert set(counts.values()) == {2, 3}


def test_every_scan_of_a_subject_gets_its_turn() -> None:
    counts = Counter(image for batch in sampler(steps=900) for image, _ in batch)
    assert set(counts) == set(range(len(SUBJECTS)))
    for scans in ([1, 3, 7], [2, 8]):
        assert min(counts[s] for s in scans) > 0.8 * 300 / len(scans)


def test_epochs_differ_in_order_and_seeds_in_everything() -> None:
    batches = [subjects_of(batch) for batch in sampler(batch_size=6)]
    assert len({tuple(batch) for batch in batches}) > 50
    assert list(sampler(seed=0)) == list(sampler(seed=0))
    assert list(sampler(seed=0)) != list(sampler(seed=1))


@pytest.mark.parametrize("start", [0, 1, 17, 59, 60])
def test_a_resumed_run_sees_the_batches_that_the_whole_run_would_have(start: int) -> None:
    whole, rest = list(sampler()), sampler(start=start)
    assert list(rest) == whole[start:]
    assert len(rest) == 60


def test_a_sampler_keeps_no_state() -> None:
    one = sampler()
    partly = list(itertools.islice(one, 7))
    assert list(one)[:7] == partly
    assert [one.batch(step) for step in (31, 4, 31)] == [list(sampler())[step] for step in (31, 4, 31)]


def test_each_image_of_each_step_has_its_own_seed() -> None:
    seeds = [seed for batch in sampler(steps=500, batch_size=6) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_a_seed_follows_from_all_its_parts_and_their_order() -> None:
    parts = list(itertools.product(range(4), repeat=3))
    assert len({derive_seed(*p) for p in parts}) == len(parts)
    assert derive_seed(1, 2, 3) == derive_seed(1, 2, 3)
    assert 0 <= derive_seed(7) < 2**32


def test_the_order_does_not_depend_on_what_subjects_are_called() -> None:
    """Keys of subjects differ from site to site; the order of the images does not."""
    renamed = [f"s-{ord('z') - ord(s)}" for s in SUBJECTS]
    assert list(sampler(renamed)) == list(sampler())


def test_a_hundred_thousand_subjects_are_sorted_out_in_no_time() -> None:
    began = time.process_time()
    assert len(sampler([f"s-{n}" for n in range(100_000)]).batch(0)) == 2
    assert time.process_time() - began < 5, "a comparison of all with all takes minutes"


class Echo(Dataset[Any]):
    """Gives back what it was asked for, and a number drawn from it."""

    def __getitem__(self, item: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        image, seed = item
        draw = torch.rand((), generator=torch.Generator().manual_seed(seed))
        return torch.tensor(image), draw


def test_a_loader_gives_the_samplers_batches_whatever_the_workers() -> None:
    found = {
        workers: [(a.tolist(), b.tolist()) for a, b in step_loader(Echo(), sampler(steps=4), workers=workers)]
        for workers in (0, 1)
    }
    assert found[0] == found[1]
    assert [images for images, _ in found[0]] == [[i for i, _ in batch] for batch in sampler(steps=4)]
