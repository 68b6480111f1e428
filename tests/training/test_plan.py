"""The plan of a run: its parts add up, what does not fit is refused, and a few real steps are behind it."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import medim.training.plan as planning
from medim.config import PretrainConfig
from medim.data.index import Index, Record
from medim.data.splits import split
from medim.training import machine
from medim.training.machine import available_memory, free_disk, held, max_memory_allocated, memory_allocated
from medim.training.plan import check, plan, predict, sample
from medim.training.rehearsal import Measured, measure
from medim.training.trainer import peak_memory
from medim.types import UserError

GIB = 2**30
CLOCK = {
    "start": 10.0,
    "first_step": 1.0,
    "step": 2.0,
    "validation": 5.0,
    "checkpoint": 0.5,
    "end": 20.0,
    "check": 0.01,
    "prepare": 0.1,
    "read": 0.0,
    "reference": 0.2,
}
MEASURED = Measured(
    steps=6,
    images=8,
    missing=3,
    reference_images=0,
    clocks={"wall": CLOCK, "cpu": {name: value / 2 for name, value in CLOCK.items()}},
    memory={"before": GIB, "steps": 2 * GIB, "end": GIB, "worker": GIB // 4},
    bytes={"image": 1e6, "in_memory": 1e6, "cached": 8e6, "checkpoint": 10**6, "history": 100.0, "run": 5e5},
)


def there(memory: int = 64 * GIB, disk: int = 64 * GIB, store: int = 64 * GIB) -> dict[str, int]:
    return {"memory": memory, "disk": disk, "store": store}


@pytest.fixture
def parts(cohort_index: Index) -> tuple[list[Record], list[Record]]:
    splits = split(cohort_index)
    train, held_out = ([r for r in cohort_index.records if splits[r.image] == part] for part in ("train", "val"))
    return train, held_out


Parts = tuple[list[Record], list[Record]]


def test_the_parts_of_a_plan_add_up(pretrain_config: PretrainConfig, parts: Parts) -> None:
    config = pretrain_config.model_copy(update={"max_steps": 25, "checkpoint_every_steps": 10})
    told = predict(config, MEASURED, 4, *parts, available=there())
    seconds = told["seconds"]
    assert seconds["start"] == pytest.approx(10 + 0.01 * (16 - 8) + 0.1 * 3), "what is missing is prepared first"
    assert seconds["steps"] == pytest.approx(1 + 25 * 2)
    assert seconds["validations"] == pytest.approx(3 * 5), "at 10, 20 and at the end"
    assert seconds["checkpoints"] == pytest.approx(2 * 0.5)
    assert seconds["end"] == 20
    assert seconds["total"] == pytest.approx(sum(value for name, value in seconds.items() if name != "total"))
    assert told["hours"] == pytest.approx(seconds["total"] / 3600)
    assert told["cpu_seconds"]["total"] == pytest.approx(seconds["total"] / 2)
    disk = told["disk_bytes"]
    assert disk["store"] == 3 * 10**6
    assert disk["checkpoints"] == 3 * 10**6, "two are kept, and one is being written"
    assert disk["run"] == 5 * 10**5 + 100 * 25
    assert disk["total"] == disk["store"] + disk["checkpoints"] + disk["run"]
    assert told["refusals"] == []


def test_a_batch_that_could_not_be_run_is_told_by_proportion(pretrain_config: PretrainConfig, parts: Parts) -> None:
    config = pretrain_config.model_copy(update={"batch_size": 16})
    told = predict(config, MEASURED, 4, *parts, available=there())
    assert told["seconds_per_step"] == 8
    assert told["peak_memory_bytes"] == pytest.approx(GIB + 16 * GIB / 4, rel=0.01)


def test_loading_processes_count_for_the_machine(pretrain_config: PretrainConfig, parts: Parts) -> None:
    alone, two = (
        predict(pretrain_config.model_copy(update={"workers": n}), MEASURED, 4, *parts, available=there())
        for n in (0, 2)
    )
    assert two["memory_bytes"] - two["peak_memory_bytes"] >= 2 * GIB // 4
    assert alone["memory_bytes"] == alone["peak_memory_bytes"]


def test_too_little_memory_is_refused_with_a_batch_and_views_that_fit(
    pretrain_config: PretrainConfig, parts: Parts
) -> None:
    config = pretrain_config.model_copy(update={"batch_size": 32})
    told = predict(config, MEASURED, 4, *parts, available=there(memory=4 * GIB))
    assert told["suggestions"]["batch_size"] == 11, "0.95 * 4 GiB hold 1 GiB and eleven images of 0.25"
    with pytest.raises(UserError, match=r"needs about 9.0 GiB, and 4.0 GiB are free here; --set batch_size=11 or"):
        check(told)
    fitting = predict(config.model_copy(update={"batch_size": 11}), MEASURED, 4, *parts, available=there(4 * GIB))
    assert fitting["refusals"] == []


@pytest.mark.parametrize(("place", "name"), [("disk", "--out"), ("store", "the store")])
def test_too_little_disk_is_refused(place: str, name: str, pretrain_config: PretrainConfig, parts: Parts) -> None:
    told = predict(pretrain_config, MEASURED, 4, *parts, available=there(**{place: 10**6}))
    with pytest.raises(UserError, match=f"disk: {name} needs about"):
        check(told)


def test_the_sample_has_the_largest_image_and_one_image_a_subject(cohort_index: Index) -> None:
    records = [*cohort_index.records[:-1], replace(cohort_index.records[-1], shape=(99, 99, 99))]
    chosen = sample(records, 5)
    assert records[-1].image in chosen
    subjects = {record.subject for record in records if record.image in chosen}
    assert len(chosen) == len(subjects) == 5


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    assert available_memory("cpu") > GIB / 4
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0
    assert held("VmHWM") >= held("VmRSS") > 0


V2 = {"memory.max": str(GIB), "memory.current": str(GIB // 2), "memory.stat": f"file 9\ninactive_file {GIB // 4}\n"}
V1 = {
    "memory.limit_in_bytes": str(GIB),
    "memory.usage_in_bytes": str(GIB // 2),
    "memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}\n",
}
UNLIMITED = {"memory.max": "max", "memory.current": "5", "memory.stat": ""}


@pytest.mark.parametrize(
    ("membership", "groups"),
    [
        ("0::/", {".": V2}),
        ("0::/job/step", {"job": V2, "job/step": UNLIMITED}),
        ("0::/seen/from/the/host", {".": V2}),
        ("5:cpu,memory:/job\n0::/", {"memory/job": V1, "memory": {**V1, "memory.limit_in_bytes": str(2**63)}}),
        ("5:devices:/\n4:memory:/docker/0123", {"memory": V1}),
    ],
)
def test_a_container_has_what_its_groups_leave_and_the_file_cache_is_free(
    membership: str, groups: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for group, files in groups.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / group / name).write_text(text)
    (tmp_path / "membership").write_text(membership + "\n")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    assert available_memory("cpu") == GIB * 3 // 4


def test_memory_is_that_of_the_device_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 5 if device else 0)
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert (available_memory("auto"), memory_allocated(gpu), max_memory_allocated(gpu)) == (7, 3, 5)
    assert min(available_memory("cpu"), memory_allocated(cpu), max_memory_allocated(cpu)) > 2**20
    assert peak_memory() > 2**20, "a GPU that is there, and not used, has no peak"


@pytest.mark.slow
def test_a_plan_is_made_of_real_steps_and_leaves_the_prepared_images_alone(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, here = tmp_path / "store", Path.cwd()
    monkeypatch.setattr(planning, "available_memory", lambda accelerator: 300 * 2**20)
    told = plan(pretrain_config, cohort_index, tmp_path / "run", store=store)
    assert told["measured_steps"] == pretrain_config.max_steps
    assert all(value >= 0 for value in told["seconds"].values())
    assert told["seconds"]["steps"] > 0
    assert told["seconds"]["end"] > 0
    assert told["disk_bytes"]["checkpoints"] > 0
    assert len(list(store.rglob("*.b2nd"))) >= 2 * 4, "images with their masks"
    assert not (tmp_path / "run").exists()
    assert Path.cwd() == here
    assert told["peak_memory_bytes"] > 100 * 2**20
    assert told["available"]["memory"] == 300 * 2**20
    with pytest.raises(UserError, match=r"memory: the run needs about .* and 0.3 GiB are free here"):
        check(told)


def test_a_batch_that_the_machine_cannot_hold_is_halved_until_it_runs(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(1)

    def measured(config: PretrainConfig, *_: Any) -> Measured:
        tried.append(config.batch_size)
        if config.batch_size > fitting:
            raise MemoryError
        return MEASURED

    monkeypatch.setattr(planning, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(planning, "measure", measured)
    fitting = 2
    told = plan(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert tried == [4, 2]
    assert told["measured_batch_size"] == 2
    assert told["batch_size"] == 4
    fitting = 1
    with pytest.raises(UserError, match="two images a step need more than"):
        plan(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")


@pytest.mark.slow
def test_a_run_that_the_machine_cannot_hold_fails_as_such_in_its_own_process(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    wide = pretrain_config.model_copy(update={"encoder": {**pretrain_config.encoder, "channels": [256, 256, 256]}})
    free = 100 * 2**20  # its activations need several times as much
    given = (wide, cohort_index, cohort_index, tmp_path / "tried", 0, "cpu", tmp_path / "store", free)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert isinstance(pool.submit(measure, *given).exception(), MemoryError)
