"""The plan of a run: its parts add up, what does not fit is refused, and a few real steps are behind it."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import medim.training.plan.plan as planning
from medim.config import PretrainConfig
from medim.data import memory
from medim.data.index.index import ImageRecord, Index
from medim.data.loading.splits import assign_splits
from medim.training.engine.resources import (
    available_memory,
    free_disk,
    max_memory_allocated,
    memory_allocated,
)
from medim.training.engine.trainer import peak_memory
from medim.training.plan.plan import check_plan, estimate_memory, plan_pretraining, predict_costs, sample_image_keys
from medim.training.plan.trial_run import TrialResult, run_trial
from medim.training.plan.workload import count_validation_images, estimate_cached_bytes
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
MEASURED = TrialResult(
    steps=6,
    images=8,
    missing=3,
    reference_images=0,
    validation_images=8 * 2 + 2 * 2,  # batches and pairs of two held-out subjects
    device="cpu",
    clocks={"wall": CLOCK, "cpu": {name: value / 2 for name, value in CLOCK.items()}},
    memory={"before": GIB, "steps": 2 * GIB, "end": GIB, "worker": GIB // 4},
    bytes={
        "image": 1e6,
        "in_memory": 1e6,
        "cached": 0,
        "worker_cached": 0,
        "checkpoint": 10**6,
        "history": 100.0,
        "run": 5e5,
    },
)


def there(memory: int = 64 * GIB, disk: int = 64 * GIB, store: int = 64 * GIB) -> dict[str, int]:
    return {"memory": memory, "disk": disk, "store": store}


@pytest.fixture
def parts(cohort_index: Index) -> tuple[list[ImageRecord], list[ImageRecord]]:
    splits = assign_splits(cohort_index)
    train, held_out = ([r for r in cohort_index.records if splits[r.image] == part] for part in ("train", "val"))
    return train, held_out


Parts = tuple[list[ImageRecord], list[ImageRecord]]


def test_the_parts_of_a_plan_add_up(pretrain_config: PretrainConfig, parts: Parts) -> None:
    config = pretrain_config.model_copy(update={"max_steps": 25, "checkpoint_every_steps": 10})
    told = predict_costs(config, MEASURED, 4, *parts, free_bytes=there())
    seconds = told["seconds"]
    assert seconds["start"] == pytest.approx(10 + 0.01 * (16 - 8) + 0.1 * 3), "what is missing is prepared first"
    assert seconds["steps"] == pytest.approx(1 + 25 * 2)
    assert seconds["validations"] == pytest.approx(3 * 5), "at 10, 20 and at the end"
    assert seconds["checkpoints"] == pytest.approx(3 * 0.5), "the last step's is always written"
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
    told = predict_costs(config, MEASURED, 4, *parts, free_bytes=there())
    assert told["seconds_per_step"] == 8
    assert told["peak_memory_bytes"] == pytest.approx(GIB + 16 * GIB / 4, rel=0.01)


def test_fewer_checkpoints_than_are_kept_take_no_more_disk(pretrain_config: PretrainConfig, parts: Parts) -> None:
    config = pretrain_config.model_copy(update={"checkpoint_every_steps": 1000})
    told = predict_costs(config, MEASURED, 4, *parts, free_bytes=there())
    assert told["disk_bytes"]["checkpoints"] == 10**6
    assert told["seconds"]["checkpoints"] == 0.5


def test_each_loading_process_keeps_training_images_of_its_own(pretrain_config: PretrainConfig, parts: Parts) -> None:
    alone, two = (
        predict_costs(pretrain_config.model_copy(update={"workers": n}), MEASURED, 4, *parts, free_bytes=there())
        for n in (0, 2)
    )
    train = len(parts[0]) * 10**6
    assert alone["memory_bytes"] == alone["peak_memory_bytes"]
    assert alone["peak_memory_bytes"] - two["peak_memory_bytes"] == train
    assert two["memory_bytes"] - two["peak_memory_bytes"] == 2 * (GIB // 4 + train)


def test_a_suggestion_counts_the_loading_processes_too(pretrain_config: PretrainConfig, parts: Parts) -> None:
    config = pretrain_config.model_copy(update={"workers": 4, "batch_size": 8})
    found = replace(MEASURED, memory={**MEASURED.memory, "steps": 3 * GIB})
    told = predict_costs(config, found, 8, *parts, free_bytes=there(memory=4 * GIB))
    assert told["refusals"][0].startswith("memory: the run needs about 4.")
    batch = told["suggestions"]["batch_size"]
    assert 2 <= batch < 8
    smaller = config.model_copy(update={"batch_size": batch})
    assert estimate_memory(smaller, found, 8, *parts).total(batch) <= 4 * GIB * 0.95


def test_where_the_end_of_a_run_does_not_fit_no_batch_is_suggested(
    pretrain_config: PretrainConfig, parts: Parts
) -> None:
    found = replace(MEASURED, memory={**MEASURED.memory, "end": 9 * GIB})
    told = predict_costs(pretrain_config, found, 4, *parts, free_bytes=there(memory=4 * GIB))
    assert told["suggestions"] == {"batch_size": None, "views": None}
    assert "no batch or view size would fit" in told["refusals"][0]


def test_no_views_larger_than_the_images_are_suggested(pretrain_config: PretrainConfig, parts: Parts) -> None:
    def suggest(shape: tuple[int, ...]) -> list[int] | None:
        trial = replace(MEASURED, image_shape=shape)
        return predict_costs(pretrain_config, trial, 4, *parts, free_bytes=there())["suggestions"]["views"]

    assert suggest((16, 16, 16)) is None, "the views have the size of the images"
    assert suggest((20, 18, 16)) == [20, 16, 16], "in multiples of the stride of the encoder"
    assert suggest((100, 100, 100)) == suggest(()) != None  # noqa: E711


def test_a_gpu_holds_neither_loading_processes_nor_kept_images(pretrain_config: PretrainConfig, parts: Parts) -> None:
    config = pretrain_config.model_copy(update={"workers": 2})
    told = predict_costs(config, replace(MEASURED, device="cuda"), 4, *parts, free_bytes=there())
    assert told["memory_bytes"] == told["peak_memory_bytes"] == 2 * GIB


def test_too_little_memory_is_refused_with_a_batch_and_views_that_fit(
    pretrain_config: PretrainConfig, parts: Parts
) -> None:
    config = pretrain_config.model_copy(update={"batch_size": 32})
    eight = replace(MEASURED, memory={**MEASURED.memory, "steps": 3 * GIB})
    told = predict_costs(config, eight, 8, *parts, free_bytes=there(memory=4 * GIB))
    assert told["suggestions"]["batch_size"] == 11, "0.95 * 4 GiB hold 1 GiB and eleven images of 0.25"
    with pytest.raises(UserError, match=r"needs about 9.0 GiB, and 4.0 GiB are free here; --set batch_size=11 or"):
        check_plan(told)
    eleven = replace(MEASURED, memory={**MEASURED.memory, "steps": GIB + 11 * GIB // 4})
    fitting = predict_costs(config.model_copy(update={"batch_size": 11}), eleven, 11, *parts, free_bytes=there(4 * GIB))
    assert fitting["refusals"] == []


def test_a_batch_that_failed_is_refused_and_none_as_large_is_suggested(
    pretrain_config: PretrainConfig, parts: Parts
) -> None:
    config = pretrain_config.model_copy(update={"batch_size": 8})
    told = predict_costs(config, MEASURED, 4, *parts, free_bytes=there())
    assert told["suggestions"]["batch_size"] == 7
    assert max(told["suggestions"]["views"]) <= max(config.views.shape)
    with pytest.raises(UserError, match=r"memory: a batch of 8 could not be run, and 64.0 GiB are free here"):
        check_plan(told)


def test_a_validation_is_counted_by_the_images_that_it_encodes(pretrain_config: PretrainConfig, parts: Parts) -> None:
    train = [replace(record, subject=f"{i}", label=str(i % 2)) for i, record in enumerate(parts[0] * 30)]
    held_out = [replace(record, subject=f"h{i}") for i, record in enumerate(parts[1] * 30)]
    steps = {"max_steps": 300, "checkpoint_every_steps": 100}
    config = pretrain_config.model_copy(update=steps | {"checkpoint_selection": "probe"})
    asked = min(64, len(train) // 3)
    encoded = 8 * 4 + 2 * 8 + min(64, len(train) - asked) + asked
    assert count_validation_images(config, train, held_out) == encoded
    told = predict_costs(config, MEASURED, 4, train, held_out, free_bytes=there())
    assert told["seconds"]["validations"] == pytest.approx(4 * 5 * encoded / 20), "at 100, 200, 250 and 300"
    unlabelled = [replace(record, label=None) for record in train]
    several = [replace(record, label="+a|-b") for record in train]
    assert (
        count_validation_images(config, unlabelled, held_out)
        == count_validation_images(config, several, held_out)
        == 48
    )


def test_the_ood_detector_looks_at_no_more_images_than_it_does_in_the_run(
    pretrain_config: PretrainConfig, parts: Parts
) -> None:
    train, held_out = parts[0] * 50, parts[1] * 2
    found = replace(MEASURED, reference_images=20)
    told = predict_costs(pretrain_config, found, 4, train, held_out, free_bytes=there())
    assert told["seconds"]["ood_detector"] == pytest.approx(0.2 * (256 + len(held_out)))
    assert told["seconds"]["end"] == pytest.approx(20 - 0.2 * 20)


def test_pairs_and_probe_keep_images_in_memory(pretrain_config: PretrainConfig, parts: Parts) -> None:
    train = [replace(record, subject=f"{i}", label=str(i % 2)) for i, record in enumerate(parts[0] * 30)]
    without = [replace(record, label=None) for record in train]
    one = 1e6
    config = pretrain_config.model_copy(update={"checkpoint_selection": "probe"})
    probe = estimate_cached_bytes(config, one, train, parts[1]) - estimate_cached_bytes(config, one, without, parts[1])
    assert probe == (64 + min(64, len(train) // 3)) * one
    large = [estimate_cached_bytes(config, GIB, records, parts[1]) for records in (train, without)]
    assert large == [(2 + 3 / 4) * GIB, (2 + 1 / 4) * GIB], "1 GiB a split, and a quarter for each gauge"


@pytest.mark.parametrize(("place", "name"), [("disk", "--out"), ("store", "the store")])
def test_too_little_disk_is_refused(place: str, name: str, pretrain_config: PretrainConfig, parts: Parts) -> None:
    told = predict_costs(pretrain_config, MEASURED, 4, *parts, free_bytes=there(**{place: 10**6}))
    with pytest.raises(UserError, match=f"disk: {name} needs about"):
        check_plan(told)


def test_the_sample_has_the_largest_image_and_one_image_a_subject(cohort_index: Index) -> None:
    records = [*cohort_index.records[:-1], replace(cohort_index.records[-1], shape=(99, 99, 99))]
    chosen = sample_image_keys(records, 5)
    assert records[-1].image in chosen
    subjects = {record.subject for record in records if record.image in chosen}
    assert len(chosen) == len(subjects) == 5


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    assert available_memory("cpu") > GIB / 4
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0
    assert max_memory_allocated(torch.device("cpu")) >= memory_allocated(torch.device("cpu")) > 0


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
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
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
    told = plan_pretraining(pretrain_config, cohort_index, tmp_path / "run", store=store)
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
        check_plan(told)


def test_a_batch_that_the_machine_cannot_hold_is_halved_until_it_runs(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def measured(config: PretrainConfig, *_: Any) -> TrialResult:
        tried.append(config.batch_size)
        if config.batch_size > fitting:
            raise MemoryError
        return MEASURED

    monkeypatch.setattr(planning, "open_process_pool", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(planning, "run_trial", measured)
    fitting = 2
    told = plan_pretraining(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert tried == [4, 2]
    assert told["measured_batch_size"] == 2
    assert told["batch_size"] == 4
    tried.clear()
    plan_pretraining(
        pretrain_config.model_copy(update={"batch_size": 3}), cohort_index, tmp_path / "run", store=tmp_path / "store"
    )
    assert tried == [3, 2]
    fitting = 1
    with pytest.raises(UserError, match="two images per step need more than"):
        plan_pretraining(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")


@pytest.mark.slow
def test_one_training_subject_is_refused_as_such(
    pretrain_config: PretrainConfig, cohort_index: Index, parts: Parts, tmp_path: Path
) -> None:
    records = tuple(replace(r, split=part) for part, own in (("train", parts[0][:1]), ("val", parts[1])) for r in own)
    with pytest.raises(UserError, match="expected at least 2 subjects to train on, got 1"):
        plan_pretraining(
            pretrain_config, replace(cohort_index, records=records), tmp_path / "run", store=tmp_path / "store"
        )


@pytest.mark.slow
def test_a_run_that_the_machine_cannot_hold_fails_as_such_in_its_own_process(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    wide = pretrain_config.model_copy(update={"encoder": {**pretrain_config.encoder, "channels": [256, 256, 256]}})
    free = 100 * 2**20  # its activations need several times as much
    given = (wide, cohort_index, cohort_index, tmp_path / "tried", 0, "cpu", tmp_path / "store", free)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert isinstance(pool.submit(run_trial, *given).exception(), MemoryError)
