"""What a process does of a run of several: its part, in the order of the whole; what it refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

from medim.training.engine.gather import GatheredFeatures, GatheredViews
from medim.training.engine.launch import launched, planned_group, slurm_environment, trainer_options, world_shape
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.training.engine.sampler import StepSampler
from medim.types import Features, UsageError, Views

SUBJECTS = [f"s-{n // 2}" for n in range(24)]
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "medim"}
SLURM |= {"SLURM_NTASKS_PER_NODE": "4"}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*TORCHRUN, *SLURM}:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_parts_of_a_batch_are_the_batch_each_slot_with_its_seed(count: int) -> None:
    parts = [
        list(StepSampler(SUBJECTS, batch_size=8, steps=9, seed=3, group=ProcessGroup(r, count))) for r in range(count)
    ]
    whole = list(StepSampler(SUBJECTS, batch_size=8, steps=9, seed=3))
    assert [[item for part in step for item in part] for step in zip(*parts, strict=True)] == whole
    for batch in whole:
        assert len({SUBJECTS[image] for image, _ in batch}) == 8, "one scan a subject in the global batch"


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("number", [1, 2, 5, 6])
def test_parts_are_equally_long_and_in_order(number: int, count: int) -> None:
    whole = torch.arange(2 * number).reshape(number, 2)
    parts = [ProcessGroup(rank, count).local_shard(whole) for rank in range(count)]
    assert len({len(part) for part in parts}) == 1
    if number >= count:
        assert torch.equal(torch.cat(parts)[:number], whole)


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do() -> None:
    ProcessGroup(0, 4, 2).check_batch(16)
    with pytest.raises(UsageError, match=r"multiple of the 8 processes.* got 20\. Set batch_size=16 or 24"):
        ProcessGroup(0, 4, 2).check_batch(20)
    with pytest.raises(UsageError, match="Set batch_size=8,"):
        ProcessGroup(0, 4, 2).check_batch(6)
    with pytest.raises(UsageError, match="multiple of the 2 processes"):
        StepSampler(SUBJECTS, batch_size=5, steps=1, seed=0, group=ProcessGroup(0, 2))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4)))


def test_batch_normalisation_becomes_synchronised_on_cuda() -> None:
    """The conversion alone: synchronised statistics need CUDA, and were not run on a CPU."""
    plain = network()
    state = plain.state_dict()
    converted = ProcessGroup(0, 2, kind="cuda").with_synced_batch_norm(plain)
    kinds = [type(m) for m in converted.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [nn.SyncBatchNorm] * 2
    assert converted.state_dict().keys() == state.keys(), "a saved encoder is the same with either"
    assert all(torch.equal(value, state[name]) for name, value in converted.state_dict().items())


def test_batch_normalisation_by_part_of_the_batch_is_refused_on_a_cpu() -> None:
    with pytest.raises(UsageError, match=r"cannot be synchronised on cpu.*each of the 2 processes"):
        ProcessGroup(0, 2).with_synced_batch_norm(network())
    free = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4))
    assert ProcessGroup(0, 2).with_synced_batch_norm(free) is free
    plain = network()
    assert SINGLE_PROCESS.with_synced_batch_norm(plain) is plain


class Counting(ProcessGroup):
    """Two processes that hold the same."""

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        self.__dict__.setdefault("seen", []).append(tuple(part.shape))
        return torch.cat([part, part + 10])


def test_a_map_is_gathered_when_somebody_looks_and_once() -> None:
    group = Counting(0, 2)
    own = Features((torch.zeros(2, 3, 4), torch.ones(2, 5)), torch.full((2, 6), 2.0))
    features = GatheredFeatures(own, 3, lambda part, count: group.gather(part)[:count])
    assert len(features.maps) == 2
    assert not hasattr(group, "seen")
    assert features.maps[-1] is features.maps[1]
    assert features.maps[1].shape == (3, 5)
    assert group.__dict__["seen"] == [(2, 5)]
    assert [tuple(m.shape) for m in features.maps] == [(3, 3, 4), (3, 5)]
    assert [tuple(m.shape) for m in features.maps[:1]] == [(3, 3, 4)]
    assert features.summary.shape == (3, 6)
    assert group.__dict__["seen"] == [(2, 5), (2, 3, 4), (2, 6)]
    views = GatheredViews(Views(torch.zeros(2, 1, 1, 8), torch.zeros(2, 1, 1)), group)
    assert views.location.shape == (4, 1, 1)
    assert (2, 1, 1, 8) not in group.__dict__["seen"], "images are large, and not every objective looks at them"
    assert views.image.shape == (4, 1, 1, 8)


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM])
def test_devices_and_nodes_follow_from_who_started_the_process(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world_shape(None, None) == (1, 1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert world_shape(None, None) == world_shape(4, 2) == world_shape(None, 2) == (4, 2)
    with pytest.raises(UsageError, match="started 4 processes on each of 2 node"):
        world_shape(2, 2)


def test_slurm_may_run_several_runs_of_one_device_and_leaves_the_requeueing_to_the_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert slurm_environment() == []
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert world_shape(1, 1) == (1, 1)
    assert slurm_environment()[0].auto_requeue is False


def test_a_slurm_job_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert world_shape(None, None) == (1, 1)


def test_a_run_of_one_process_starts_nothing() -> None:
    plan = planned_group("cpu", None, None)
    with launched("cpu", plan) as group:
        assert group is SINGLE_PROCESS
    assert trainer_options("cpu", SINGLE_PROCESS) == {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "strategy": "auto",
    }
    for find_unused in (False, True):
        strategy: Any = trainer_options("cpu", ProcessGroup(0, 2), find_unused=find_unused)["strategy"]
        assert strategy._ddp_kwargs == {"find_unused_parameters": find_unused}


def test_a_run_of_one_process_waits_for_no_other() -> None:
    with SINGLE_PROCESS.main_process_first():
        assert SINGLE_PROCESS.is_main
    assert SINGLE_PROCESS.broadcast(2) == 2
    assert SINGLE_PROCESS.any_true(True)
    assert not SINGLE_PROCESS.any_true(False)
    SINGLE_PROCESS.check_same(seed=1)
    with pytest.raises(KeyError), SINGLE_PROCESS.main_process_first():
        raise KeyError


@pytest.mark.parametrize(
    ("error", "exit_code"), [(None, 0), (UsageError("wrong option"), 2), (RuntimeError("broken"), 1), (SystemExit(), 1)]
)
def test_a_failure_of_the_first_process_ends_the_others(
    error: BaseException | None, exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collective is replaced by a list: the first process fills it, the second reads it."""
    sent: list[Any] = []
    steps: list[str] = []

    def broadcast(values: list[Any], *, src: int, group: Any) -> None:
        if values[0] is None:  # a process other than the first
            values[0] = sent[-1]
        else:
            assert steps == ["first"], "the others wait until the first has done"
            sent.append(values[0])

    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    first, second = ProcessGroup(0, 2), ProcessGroup(1, 2)
    with contextlib.suppress(type(error) if error else KeyError), first.main_process_first():
        steps.append("first")
        if error:
            raise error
    assert sent == [exit_code]
    if error is None:
        with second.main_process_first():
            steps.append("second")
        assert steps == ["first", "second"]
        return
    with pytest.raises(SystemExit) as caught, second.main_process_first():
        steps.append("second")
    assert caught.value.code == exit_code
    assert steps == ["first"], "the block is not run after a failure"
