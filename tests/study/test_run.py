from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow.tracking import MlflowClient

from medim.config import FinetuneConfig
from medim.evaluation.probing.label_budget import Budget
from medim.files import read_json, write_json
from medim.signals import StoppedError, handle_shutdown_signals
from medim.study import cell, run
from medim.study.design import Arm, read_arms
from medim.study.report.report import write_study_page
from medim.study.results import RunKey, open_results
from medim.study.scheduler import Scheduler
from medim.study.worker_pool import run_all
from medim.tracking import tracking
from medim.tracking.outbox import RECORDS, STATE
from medim.training.finetune.module import FinetuneModule
from medim.training.finetune.run import finetune
from medim.types import UserError

Study = Callable[..., dict[str, Any]]
ONE = {"budgets": (Budget(labelled=4),), "seeds": 1}


@pytest.fixture
def small(run_study: Study, encoders: list[Path]) -> Study:
    """A study of two cells: one encoder and its twin at one budget."""
    return lambda *given, **options: run_study(*given, **{**ONE, "arms": read_arms([f"dim={encoders[0]}"]), **options})


def test_a_study_runs_every_arm_at_every_budget_and_says_what_came_out(run_study: Study, tmp_path: Path) -> None:
    out = tmp_path / "study"
    summary = run_study()
    assert summary == read_json(out / "summary.json")
    assert (summary["complete"], summary["cells"]["all"], summary["cells"]["done"]) == (True, 16, 16)
    rows = pq.read_table(out / "results.parquet").to_pylist()
    runs = {(r["arm"], r["pretrain_seed"], r["budget"], r["subset_seed"]) for r in rows}
    assert runs == {(i, s, b, t) for i in ("scratch", "dim") for s in (0, 1) for b in ("4", "12") for t in (0, 1)}
    assert {r["step"] for r in rows} == {None, 2}
    assert {r["metric"] for r in rows} == {"probability_down", "probability_up", "truth"}
    assert {r["n_labelled"] for r in rows if r["budget"] == "12"} == {12}
    assert [(r["arm"], r["budget"]) for r in summary["comparisons"]["rows"]] == [("dim", "4"), ("dim", "12")]
    assert {p.name for p in (out / "cells" / "dim" / "4" / "0-0").iterdir()} == {
        *(".medim", "config.yaml", "inputs.json", "mlflow.json", "history.csv", "cases.parquet", "cases-2.parquet"),
        "summary.json",
    }
    kept = {p.parent.relative_to(out / "cells").as_posix() for p in (out / "cells").rglob("model")}
    assert kept == {"dim/12/0-0", "scratch/12/0-0"}
    assert (out / "splits" / "1.csv").is_file()
    assert set(read_json(out / "audit.json")["models"]) == {"scratch, 12 labels", "dim, 12 labels"}


def test_the_results_of_a_cell_are_those_of_medim_finetune(
    small: Study, schedule: FinetuneConfig, index: Any, encoders: list[Path], tmp_path: Path
) -> None:
    small()
    options: dict[str, Any] = {"labelled": 4, "seed": 0, "store": tmp_path / "store", "accelerator": "cpu"}
    alone = finetune(schedule, index, tmp_path / "alone", encoder=encoders[0], **options)
    cell = read_json(tmp_path / "study" / "cells" / "dim" / "4" / "0-0" / "summary.json")
    assert cell["val"] == alone["val"]
    results = open_results(tmp_path / "study")
    shown = results.statistic("auroc", next(r for r in results.values if r.arm == "dim" and r.step is None))
    assert float(shown(np.ones((1, 12)))[0]) == pytest.approx(alone["val"]["metrics"]["auroc"]["value"])


def test_cells_whose_model_does_not_find_a_class_are_listed(
    small: Study, schedule: FinetuneConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The heads start at 0, and a rate below the smallest number of float32 leaves all answers at the first class."""
    summary = small(config=schedule.model_copy(update={"lr": 1e-60, "weight_decay": 0.0}))
    names = [f"{arm}, 4 labels, encoder 0, subset 0" for arm in ("scratch", "dim")]
    cells = [{"cell": name, "classes": {"up": 0.0}} for name in names]
    assert summary["lost_classes"] == cells
    assert f"2 of 2 fine-tuned cells do not find some class (first: {names[0]}: up)" in caplog.text
    assert "2 fine-tuned cells do not find some class" in (tmp_path / "study" / "report.html").read_text()


@pytest.mark.slow
def test_the_same_study_twice_gives_the_same_bytes(small: Study, tmp_path: Path) -> None:
    for name in ("one", "two"):
        small(tmp_path / name)
    assert (tmp_path / "one" / "results.parquet").read_bytes() == (tmp_path / "two" / "results.parquet").read_bytes()


@pytest.mark.slow
def test_a_study_killed_between_and_inside_cells_goes_on_to_the_same_bytes(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "whole")
    steps = []

    def killed(self: FinetuneModule, *given: Any) -> Any:
        steps.append(self.global_step)
        if len(steps) == 7:  # the third step of the second cell
            raise KeyboardInterrupt
        return step(self, *given)

    step = FinetuneModule.training_step
    monkeypatch.setattr(FinetuneModule, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        small()
    monkeypatch.undo()
    begun = [tmp_path / "study" / "cells" / name / "4" / "0-0" for name in ("scratch", "dim")]
    assert [(folder / "summary.json").is_file() for folder in begun] == [True, False]
    assert (begun[1] / "checkpoints" / "step-2.ckpt").is_file()
    before = (begun[0] / "summary.json").stat().st_mtime_ns
    (begun[0] / "split.csv").touch()  # as after a kill between the summary and the removal of other files
    (begun[0] / "checkpoints").mkdir()
    summary = small(resume=True)
    assert not {"split.csv", "checkpoints"} & {path.name for path in begun[0].iterdir()}
    assert (summary["complete"], summary["n_resumed_cells"]) == (True, 1)
    assert (begun[0] / "summary.json").stat().st_mtime_ns == before
    results = [(tmp_path / name / "results.parquet").read_bytes() for name in ("whole", "study")]
    assert results[0] == results[1]


def test_another_study_is_not_taken_up(small: Study) -> None:
    small()
    with pytest.raises(UserError, match="expected an empty or new folder"):
        small()
    with pytest.raises(UserError, match=r"needs the same study.*seeds 1 \(now 2\)"):
        small(resume=True, seeds=2)


def write_old_names(study: Path) -> None:
    """Give the files of a study the names of keys, and a hash over these names, of the version of commit b8dc2eb."""
    design = read_json(study / "design.json")
    design |= {"measure_at": design.pop("eval_steps"), "config_hash": "000000000000"}
    write_json(study / "design.json", design)
    for path in study.rglob("config.yaml"):
        text = path.read_text()
        for new, old in {"eval_steps": "measure_at", "lr_milestones": "drop_at", "same_crop": "same_place"}.items():
            assert text.count(f"{new}:") == 1
            text = text.replace(f"{new}:", f"{old}:")
        path.write_text(text)


@pytest.mark.slow
def test_a_study_of_an_earlier_version_is_resumed(
    small: Study, schedule: FinetuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(tmp_path / "whole")
    monkeypatch.setattr(run.DurationEstimator, "__call__", lambda _, cell: 0 if cell.arm.name == "scratch" else 10**6)
    with pytest.raises(StoppedError, match="1 of 2 cells are left"):
        small(max_hours=1)
    write_old_names(tmp_path / "study")
    longer = schedule.model_copy(update={"max_steps": 5})
    with pytest.raises(UserError, match=r"needs the same study.*config_hash 000000000000 \(now "):
        small(resume=True, config=longer)
    summary = small(resume=True)
    assert (summary["complete"], summary["n_resumed_cells"]) == (True, 0)
    assert read_json(tmp_path / "study" / "design.json") == read_json(tmp_path / "whole" / "design.json")
    results = [(tmp_path / name / "results.parquet").read_bytes() for name in ("whole", "study")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_a_finished_study_is_summarised_again_without_timing_a_step(
    small: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = small()
    monkeypatch.setattr("medim.study.prepare.measure_costs", lambda *_: pytest.fail("timed"))
    after = small(resume=True)
    assert after["comparisons"] == before["comparisons"]


def test_a_study_out_of_hours_leaves_what_is_done_and_says_what_is_left(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoppedError, match="2 of 2 cells are left") as stopped:
        small(max_hours=0)
    assert stopped.value.exit_code == 75
    audited = read_json(tmp_path / "study" / "audit.json")
    assert (audited["models"], len(audited["shortcuts"])) == ({}, 5)
    monkeypatch.setattr(run.DurationEstimator, "__call__", lambda _, cell: 0 if cell.arm.name == "scratch" else 10**6)
    with pytest.raises(StoppedError, match="1 of 2 cells are left"):
        small(max_hours=1, resume=True)
    summary = read_json(tmp_path / "study" / "summary.json")
    assert (summary["complete"], summary["comparisons"]) == (False, None)
    assert summary["cells"]["left"] == ["dim, 4 labels, encoder 0, subset 0"]
    assert set(read_json(tmp_path / "study" / "audit.json")["models"]) == {"scratch, 4 labels"}
    assert set(pq.read_table(tmp_path / "study" / "results.parquet")["arm"].to_pylist()) == {"scratch"}
    monkeypatch.undo()
    whole = small(resume=True)
    assert whole["complete"]
    assert whole["wall_hours"] > summary["wall_hours"] > 0


@pytest.mark.parametrize(
    ("number", "in_command"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGUSR1, True)],
)
def test_a_signal_in_a_cell_saves_it_and_begins_no_other(
    small: Study,
    tmp_path: Path,
    schedule: FinetuneConfig,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    in_command: bool,
) -> None:
    def signalled(*given: Any, **options: Any) -> dict[str, Any]:
        os.kill(os.getpid(), number)  # before its first step
        time.sleep(0.1)
        return finetune(*given, **options)

    monkeypatch.setattr("medim.study.worker_pool.REMIND_SECONDS", 0.01)
    monkeypatch.setattr(cell, "finetune", signalled)
    handlers = handle_shutdown_signals() if in_command else nullcontext()
    with pytest.raises(StoppedError, match="2 of 2 cells are left"), handlers:
        small(config=schedule.model_copy(update={"max_steps": 2000, "checkpoint_every_steps": 1000}))
    folder = tmp_path / "study" / "cells" / "scratch" / "4" / "0-0"
    assert not (folder / "summary.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("error", "times"), [(UserError("lower lr"), 1), (RuntimeError("out of memory"), 2)], ids=["for good", "by chance"]
)
def test_a_cell_that_fails_is_told_and_the_others_are_kept(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    tried = []

    def failing(*given: Any, **options: Any) -> dict[str, Any]:
        if given[3].encoder is None:
            return finetune(*given, **options)
        tried.append(given[2])
        raise error

    monkeypatch.setattr(cell, "finetune", failing)
    with pytest.raises(UserError, match=f"dim, 4 labels, encoder 0, subset 0: .*{error}"):
        small()
    assert len(tried) == times
    summary = read_json(tmp_path / "study" / "summary.json")
    assert (summary["complete"], summary["cells"]["done"]) == (False, 1)
    assert summary["cells"]["failed"][0]["cell"] == "dim, 4 labels, encoder 0, subset 0"


@pytest.mark.slow
def test_a_rate_that_could_not_be_tried_is_not_chosen_and_not_tried_again(
    small: Study, schedule: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given: Any, **options: Any) -> dict[str, Any]:
        if given[0].lr > 2 * schedule.lr:
            raise UserError("it diverged")
        return finetune(*given, **options)

    monkeypatch.setattr(cell, "finetune", failing)
    options: dict[str, Any] = {"budgets": (Budget(labelled=20),), "lr_multipliers": (1.0, 3.0)}
    summary = small(**options)
    assert summary["complete"], "what was chosen from is no result"
    assert {cell["reason"] for cell in summary["cells"]["failed"]} == {"it diverged"}
    assert summary["learning_rates"]["dim"]["20"]["multiple"] == 1
    monkeypatch.setattr(cell, "finetune", finetune)
    again = small(**options, resume=True)
    assert again["learning_rates"] == summary["learning_rates"]
    assert again["cells"]["done"] == summary["cells"]["done"]


@pytest.mark.slow
def test_each_cell_is_a_child_of_the_study_in_mlflow(small: Study, tmp_path: Path) -> None:
    small()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("medim-study")
    assert experiment is not None
    parent = read_json(tmp_path / "study" / STATE)["run"]
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(runs) == 2
    study = client.get_run(parent)
    assert study.info.status == "FINISHED"
    assert all("val/auroc" in found.data.metrics for found in runs)
    assert len({found.info.run_name for found in runs}) == 2
    values = [study.data.metrics[f"dim/4/difference{end}"] for end in ("_low", "", "_high")]
    assert values == sorted(values)
    assert {"comparisons.json", "figures"} <= {file.path for file in client.list_artifacts(parent)}


@pytest.mark.slow
def test_a_study_goes_on_while_its_tracking_server_is_away_and_sends_later(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(agenda: Scheduler) -> None:
        with monkeypatch.context() as away:
            away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens
            away.setattr(tracking, "SHUTDOWN_TIMEOUT", 0.1)
            run_all(agenda)
        assert len(list((tmp_path / "study" / "cells").rglob(RECORDS))) == 2

    monkeypatch.setattr(run, "run_all", alone)
    assert small()["complete"]
    client = MlflowClient()
    parent = client.get_run(read_json(tmp_path / "study" / STATE)["run"])
    assert (parent.info.status, parent.data.metrics["cells"]) == ("FINISHED", 2)
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [(child.info.status, "val/auroc" in child.data.metrics) for child in children] == [("FINISHED", True)] * 2
    assert not list((tmp_path / "study").rglob(RECORDS))


def test_a_frozen_classifier_is_measured_beside_the_anchors(
    run_study: Study, encoders: list[Path], tmp_path: Path
) -> None:
    arms = read_arms([], [f"dim={encoders[0]},{encoders[1]}", f"other={encoders[1]}"])
    summary = run_study(arms=arms, seeds=1)
    rows = pq.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    runs = {(r["arm"], r["protocol"], r["pretrain_seed"]) for r in rows if r["budget"] == "4"}
    frozen = {
        (name, "frozen", s) for name, s in (("dim", 0), ("dim", 1), ("other", 0), ("untrained", 0), ("pixels", 0))
    }
    assert runs == frozen | {("scratch", "finetune", s) for s in (0, 1)}
    assert {row["arm"] for row in summary["comparisons"]["rows"]} == {"dim", "other"}
    audited = read_json(tmp_path / "study" / "audit.json")["models"]
    assert set(audited) == {"scratch, 12 labels", "dim, 12 labels", "other, 12 labels"}
    shown = open_results(tmp_path / "study").statistic("auroc", RunKey("dim", "12", 0, 0))
    assert audited["dim, 12 labels"]["auroc"]["value"] == pytest.approx(float(shown(np.ones((1, 12)))[0]))


def test_a_table_of_groups_gives_metrics_and_probes_for_each(small: Study, tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("image,site\n" + "".join(f"picture{n:02d},{'ab'[n // 2 % 2]}\n" for n in range(60)))
    small(groups=table)
    audited = read_json(tmp_path / "study" / "audit.json")
    groups = {(g["model"], g["value"]): g["subjects"] for g in audited["groups"]}
    assert set(groups) == {(f"{arm}, 4 labels", site) for arm in ("scratch", "dim") for site in "ab"}
    assert groups["dim, 4 labels", "a"] + groups["dim, 4 labels", "b"] == 12
    assert {(p["column"], p["features"]) for p in audited["probes"]} == {("site", "dim"), ("site", "pixels")}
    page = (tmp_path / "study" / "report.html").read_text()
    assert "site: a" in page
    write_study_page(tmp_path / "study")
    assert (tmp_path / "study" / "report.html").read_text() == page


def test_a_column_that_names_subjects_is_refused_before_anything_is_trained(small: Study, tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("image,born\n" + "".join(f"picture{n:02d},{1900 + n}\n" for n in range(60)))
    with pytest.raises(
        UserError, match="column born may identify subjects: 60 of its 60 values belong to one subject each"
    ):
        small(groups=table)
    assert not (tmp_path / "study").exists()


def test_the_twin_alone_is_no_study(run_study: Study) -> None:
    with pytest.raises(AssertionError):
        run_study(arms=(Arm("scratch"),))
