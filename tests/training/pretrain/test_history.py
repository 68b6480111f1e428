"""The verdict on a run, and the history it rests on."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medim.objectives import Term
from medim.training.pretrain.checkpoint_selection import CheckpointSelection
from medim.training.pretrain.history import DIVERGENCE_PATIENCE, HISTORY_COLUMNS, MetricHistory

MODULE: Any = None


def verdict(history: MetricHistory) -> str:
    return history.compute_verdict().verdict


def trainer_at(step: int) -> Any:
    return SimpleNamespace(global_step=step, logger=None, max_steps=100, should_stop=False)


def train(history: MetricHistory, step: int, **terms: Term) -> Any:
    trainer = trainer_at(step)
    history.on_train_batch_start(trainer, MODULE, None, step)
    history.on_train_batch_end(trainer, MODULE, {n.replace("__", "/"): t for n, t in terms.items()}, None, step)
    return trainer


def validate(history: MetricHistory, step: int, losses: dict[str, list[float]], summaries: torch.Tensor) -> Any:
    trainer = trainer_at(step)
    history.on_validation_start(trainer, MODULE)
    for index in range(max(len(values) for values in losses.values())):
        terms = {name: Term(torch.tensor(values[index])) for name, values in losses.items()}
        outputs = {"terms": terms, "summary": summaries}
        history.on_validation_batch_end(trainer, MODULE, outputs, None, index)
    history.on_validation_end(trainer, MODULE)
    return trainer


def spread(count: int = 32) -> torch.Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(0))


def run(
    held_out: dict[str, list[float]],
    chance: dict[str, float | None],
    summaries: torch.Tensor | None = None,
) -> MetricHistory:
    history = MetricHistory()
    train(history, 1, **{n.replace("/", "__"): Term(torch.tensor(1.0), c) for n, c in chance.items()})
    validate(history, 1, held_out, spread() if summaries is None else summaries)
    return history


@pytest.mark.parametrize(
    ("held_out", "chance", "expected"),
    [
        ([2.0, 2.1, 1.9], 4.0, "learning"),
        ([3.92, 3.92, 3.92], 4.0, "weak"),  # below by less than 0.1 nat
        ([3.89, 3.89, 3.89], 4.0, "learning"),
        ([1.0, 6.5, 3.0], 4.0, "at-chance"),  # 0.5 below, but three standard errors are 4.8
        ([4.0, 4.0], 4.0, "at-chance"),
        ([4.15, 4.15], 4.0, "at-chance"),  # as an untrained network
        ([4.3, 4.3], 4.0, "diverged"),  # above chance by more than 5 %
        ([-0.09, -0.09], 0.0, "weak"),  # jsd
        ([-0.11, -0.11], 0.0, "learning"),
        ([0.2, 0.2], 0.0, "diverged"),
        ([math.nan, 1.0], 4.0, "diverged"),
    ],
)
def test_the_verdict_weighs_the_gain_over_chance_against_its_error(
    held_out: list[float], chance: float, expected: str
) -> None:
    assert verdict(run({"local_dim": held_out}, {"local_dim": chance})) == expected


def test_every_term_with_a_chance_level_has_to_learn() -> None:
    chance = {"local_dim": 4.0, "coordinates": 3.0, "prior_matching": None}
    assert verdict(run({"local_dim": [2.0], "coordinates": [1.0], "prior_matching": [9.0]}, chance)) == "learning"
    assert verdict(run({"local_dim": [2.0], "coordinates": [3.0], "prior_matching": [0.1]}, chance)) == "at-chance"


def test_an_objective_of_weight_0_has_no_vote() -> None:
    chance: dict[str, float | None] = {"local_dim": 4.0, "coordinates": 3.0}
    for loss in (3.0, 9.0, math.nan):
        history = MetricHistory(weights={"local_dim": 1.0, "coordinates": 0.0}, stop_on_collapse=True)
        for step in range(1, 40):
            terms = {name: Term(torch.tensor(loss if name == "coordinates" else 3.0), chance[name]) for name in chance}
            train(history, step, **terms)
        validate(history, 40, {"local_dim": [2.0], "coordinates": [loss]}, spread())
        assert verdict(history) == "learning"
        assert not history.has_diverged


def test_a_term_of_an_objective_of_several_counts_too() -> None:
    chance: dict[str, float | None] = {"amdim/one": 4.0, "amdim/two": 4.0}
    assert run({"amdim/one": [2.0], "amdim/two": [2.0]}, chance).chance_levels() == chance
    assert verdict(run({"amdim/one": [2.0], "amdim/two": [4.0]}, chance)) == "at-chance"


def test_a_held_out_gain_is_over_its_own_batchs_chance_where_chance_varies() -> None:
    history = MetricHistory()
    for step, level in enumerate((5.0, 6.0, 4.0), start=1):
        train(history, step, local_dim=Term(torch.tensor(level - 0.5), level))
    trainer = trainer_at(3)
    history.on_validation_start(trainer, MODULE)
    for level in (3.0, 4.5):
        outputs = {"terms": {"local_dim": Term(torch.tensor(level - 1.0), level)}, "summary": spread()}
        history.on_validation_batch_end(trainer, MODULE, outputs, None, 0)
    history.on_validation_end(trainer, MODULE)
    assert history.chance_levels()["local_dim"] == 5.0
    assert history.held_out["local_dim"][0] == pytest.approx(4.0)


@pytest.mark.parametrize(
    "summaries",
    [
        torch.ones(32, 6),
        torch.zeros(32, 6),
        torch.linspace(-1, 1, 32).unsqueeze(1) * torch.ones(32, 6),  # a line through the origin
        1 + 1e-3 * spread(),
    ],
    ids=["point", "zero", "line", "cloud"],
)
def test_summaries_on_a_point_or_a_line_are_collapsed(summaries: torch.Tensor) -> None:
    assert verdict(run({"local_dim": [2.0]}, {"local_dim": 4.0}, summaries)) == "collapsed"


def test_summaries_that_no_objective_reads_decide_nothing() -> None:
    history = MetricHistory(summary_trained=False)
    train(history, 1, dense_dim=Term(torch.tensor(1.0), 4.0))
    validate(history, 1, {"dense_dim": [2.0]}, torch.ones(32, 6))
    assert history.feature_std == 0
    assert verdict(history) == "learning"


def test_a_training_loss_that_is_no_number_stops_the_run_and_is_its_verdict() -> None:
    history = MetricHistory()
    assert train(history, 1, local_dim=Term(torch.tensor(1.0), 4.0)).should_stop is False
    assert train(history, 2, local_dim=Term(torch.tensor(math.inf), 4.0)).should_stop is True
    validate(history, 2, {"local_dim": [2.0]}, spread())
    assert verdict(history) == "diverged"
    assert history.curve("local_dim")[0] == 1.0
    assert math.isnan(history.curve("local_dim")[1])


def test_summaries_that_are_no_numbers_are_measured_as_collapsed() -> None:
    assert verdict(run({"local_dim": [2.0]}, {"local_dim": 4.0}, torch.full((8, 6), math.nan))) == "collapsed"


def test_a_validation_forgets_the_one_before() -> None:
    history = run({"local_dim": [2.0, 4.0]}, {"local_dim": 5.0})
    assert history.held_out["local_dim"] == (3.0, pytest.approx(1.0))  # the standard error of 2 and 4
    validate(history, 9, {"local_dim": [1.0]}, torch.ones(4, 6))
    assert history.held_out["local_dim"] == (1.0, 0.0)
    assert history.held_out_step == 9
    assert history.feature_std == pytest.approx(0, abs=1e-6)


def test_the_history_file_has_a_row_a_loss_a_diagnostic_and_a_held_out_value(tmp_path: Path) -> None:
    history = MetricHistory()
    train(history, 1, local_dim=Term(torch.tensor(1.5), 4.0, {"retrieval": torch.tensor(0.25)}))
    train(history, 2, local_dim=Term(torch.tensor(math.nan), 4.0))
    validate(history, 2, {"local_dim": [2.0]}, spread())
    history.write(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows == [
        list(HISTORY_COLUMNS),
        ["1", "local_dim", "1.5", "4.0", ""],
        ["1", "local_dim/retrieval", "0.25", "", ""],
        ["2", "local_dim", "", "4.0", ""],
        ["2", "verdict/diverged", "", "", ""],
        ["2", "local_dim", "", "", "2.0"],
        ["2", "rankme", "", "", str(history.rankme)],
        ["2", "feature_std", "", "", str(history.feature_std)],
    ]
    assert history.chance_levels() == {"local_dim": 4.0}


def test_a_resumed_history_goes_on_where_the_checkpoint_stood(tmp_path: Path) -> None:
    history = run({"local_dim": [2.0]}, {"local_dim": 4.0})
    torch.save(history.state_dict(), tmp_path / "state.ckpt")
    again = MetricHistory()
    again.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    assert again.rows == history.rows
    train(again, 2, local_dim=Term(torch.tensor(0.5), 4.0))
    assert again.curve("local_dim") == [1.0, 0.5]
    assert history.curve("local_dim") == [1.0], "the checkpoint's rows are not shared"


def test_checkpoints_of_earlier_versions_contain_the_history_under_its_key() -> None:
    assert MetricHistory().state_key == "History"  # Lightning drops the state of a callback with another key


def test_times_are_those_of_the_steps() -> None:
    history = MetricHistory()
    for step in range(1, 4):
        train(history, step, local_dim=Term(torch.tensor(1.0)))
    assert history.seconds_per_step > 0
    assert 0 <= history.dataloader_wait_fraction <= 1


def test_a_smaller_held_out_batch_is_judged_by_its_own_chance_level() -> None:
    history = MetricHistory()
    train(history, 1, local_dim=Term(torch.tensor(8.0), 8.6))
    trainer = trainer_at(1)
    history.on_validation_start(trainer, MODULE)
    at_its_chance = {"terms": {"local_dim": Term(torch.tensor(7.6), 7.6)}, "summary": spread()}
    history.on_validation_batch_end(trainer, MODULE, at_its_chance, None, 0)
    history.on_validation_end(trainer, MODULE)
    assert history.held_out["local_dim"][0] == pytest.approx(8.6)
    assert verdict(history) == "at-chance"


@pytest.mark.parametrize(("stop", "excess", "ends"), [(True, 1.5, True), (True, 0.5, False), (False, 1.5, False)])
def test_a_run_whose_loss_stays_far_above_chance_ends_where_that_was_asked_for(
    stop: bool, excess: float, ends: bool
) -> None:
    history = MetricHistory(stop_on_collapse=stop)
    stopped = [
        train(history, step, dim=Term(torch.tensor(4.0 + (excess if step > 5 else -1.0)), 4.0)).should_stop
        for step in range(1, 41)
    ]
    assert any(stopped) == ends
    if ends:
        assert stopped.index(True) + 1 == 5 + DIVERGENCE_PATIENCE
        assert verdict(history) == "diverged"


def test_a_history_of_before_the_lowest_loss_was_kept_is_taken_up() -> None:
    state = MetricHistory().state_dict()
    del state["lowest"]
    history = MetricHistory()
    history.load_state_dict(state)
    train(history, 1, dim=Term(torch.tensor(3.0), 4.0))
    assert history.curve("dim") == [3.0]


def test_a_loss_that_falls_from_far_above_chance_is_on_its_way() -> None:
    history = MetricHistory(stop_on_collapse=True)
    losses = [104 * 0.97**step for step in range(80)]
    assert losses[-1] > 4 + 1
    assert not any(
        train(history, step, dim=Term(torch.tensor(loss), 4.0)).should_stop for step, loss in enumerate(losses, start=1)
    )


def test_one_bad_step_ends_nothing() -> None:
    history = MetricHistory(stop_on_collapse=True)
    losses = [9.0 if step % DIVERGENCE_PATIENCE == 0 else 3.0 for step in range(1, 4 * DIVERGENCE_PATIENCE)]
    assert not any(
        train(history, step, dim=Term(torch.tensor(loss), 4.0)).should_stop for step, loss in enumerate(losses, start=1)
    )


@pytest.mark.parametrize("stop", [True, False])
def test_a_run_whose_summaries_have_collapsed_ends_where_that_was_asked_for(stop: bool) -> None:
    history = MetricHistory(stop_on_collapse=stop)
    train(history, 1, dim=Term(torch.tensor(3.0), 4.0))
    trainer = validate(history, 1, {"dim": [3.0]}, torch.ones(8, 6))
    assert trainer.should_stop == stop
    assert verdict(history) == "collapsed"


def test_what_objectives_watch_is_kept_in_training_and_held_out() -> None:
    history = MetricHistory()
    for step in range(1, 31):
        train(history, step, dim=Term(torch.tensor(3.0), 4.0, {"retrieval": torch.tensor(step / 100)}))
    trainer = trainer_at(30)
    history.on_validation_start(trainer, MODULE)
    for value in (0.2, 0.4):
        terms = {"dim": Term(torch.tensor(3.0), 4.0, {"retrieval": torch.tensor(value)})}
        history.on_validation_batch_end(trainer, MODULE, {"terms": terms, "summary": spread()}, None, 0)
    history.on_validation_end(trainer, MODULE)
    found = history.diagnostics()
    assert list(found) == ["dim/retrieval"]
    assert found["dim/retrieval"] == pytest.approx({"last": sum(range(11, 31)) / 2000, "val": 0.3})


def test_a_verdict_is_said_once_at_the_step_where_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    history = MetricHistory()
    for step in range(1, 61):
        train(history, step, dim=Term(torch.tensor(9.0 if step <= 30 else 3.0), 4.0))
    assert [(step, found) for step, found, _ in history.verdict_changes] == [(DIVERGENCE_PATIENCE, "diverged")]
    validate(history, 60, {"dim": [2.0]}, spread())
    validate(history, 70, {"dim": [2.0]}, spread())
    validate(history, 80, {"dim": [2.0]}, torch.ones(8, 6))
    assert [(step, found) for step, found, _ in history.verdict_changes[1:]] == [(60, "learning"), (80, "diverged")]
    assert [row[:2] for row in history.rows if row[1].startswith("verdict/")][-1] == (80, "verdict/diverged")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert "one nat or more above its chance level 4" in warnings[0]
    assert "Advice: Lower the learning rate" in warnings[0]


def test_being_at_chance_is_said_from_the_first_look_on_or_at_the_end() -> None:
    history = MetricHistory()
    train(history, 1, dim=Term(torch.tensor(4.0), 4.0))
    validate(history, 50, {"dim": [4.0]}, spread())
    assert (history.verdict_changes, verdict(history)) == ([], "at-chance")
    validate(history, 100, {"dim": [4.0]}, spread())  # max_steps of these tests
    assert [(step, found) for step, found, _ in history.verdict_changes] == [(100, "at-chance")]


def test_gauges_and_gradient_norms_stand_in_the_history_and_not_among_the_diagnostics() -> None:
    module: Any = SimpleNamespace(encoder="the encoder")
    history = MetricHistory(
        encoder_metrics=[lambda encoder: {"alignment": float(len(str(encoder))), "uniformity": math.nan}]
    )
    outputs = {"dim": Term(torch.tensor(3.0), 4.0), "gradient_norms": {"encoder": torch.tensor(2.0)}}
    history.on_train_batch_end(trainer_at(1), module, outputs, None, 0)
    history.on_validation_batch_end(
        trainer_at(1), module, {"terms": {"dim": Term(torch.tensor(3.0), 4.0)}, "summary": spread()}, None, 0
    )
    history.on_validation_end(trainer_at(1), module)
    assert (1, "gradient_norm/encoder", 2.0, None, None) in history.rows
    assert (1, "alignment", None, None, 11.0) in history.rows
    assert (1, "uniformity", None, None, None) in history.rows
    assert history.diagnostics() == {}
    assert history.chance_levels() == {"dim": 4.0}


def test_a_resumed_history_has_the_verdict_and_the_counts_of_the_one_that_was_saved(tmp_path: Path) -> None:
    history = MetricHistory()
    for step in range(1, DIVERGENCE_PATIENCE):
        train(history, step, dim=Term(torch.tensor(9.0), 4.0))
    validate(history, DIVERGENCE_PATIENCE - 1, {"dim": [3.9]}, spread())
    torch.save(history.state_dict(), tmp_path / "state.ckpt")
    again = MetricHistory()
    again.load_state_dict(torch.load(tmp_path / "state.ckpt", weights_only=True))
    for each in (history, again):
        train(each, DIVERGENCE_PATIENCE, dim=Term(torch.tensor(9.0), 4.0))
    assert [(step, found) for step, found, _ in again.verdict_changes] == [(DIVERGENCE_PATIENCE, "diverged")]
    assert (again.rows, again.verdict_changes, again.compute_verdict()) == (
        history.rows,
        history.verdict_changes,
        history.compute_verdict(),
    )
    assert again.held_out_step == DIVERGENCE_PATIENCE - 1


def test_the_selection_is_offered_the_weighted_loss_and_never_what_has_collapsed() -> None:
    offered: list[tuple[int, float, float]] = []

    class Kept(CheckpointSelection):
        def update(self, step: int, score: float, error: float, figures: Any, module: Any) -> None:
            offered.append((step, score, error))

    history = MetricHistory(selection=Kept(), weights={"dim": 1.0, "coordinates": 0.5})
    train(
        history,
        1,
        dim=Term(torch.tensor(4.0), 4.0),
        coordinates=Term(torch.tensor(3.0), 3.0),
        vae=Term(torch.tensor(1)),
    )
    losses = {"dim": [1.0, 3.0], "coordinates": [2.0, 2.0], "vae": [9.0, 9.0]}
    validate(history, 1, losses, spread())
    validate(history, 2, losses, torch.ones(8, 6))
    assert offered[0] == (1, -3.0, pytest.approx(1.0))
    assert math.isnan(offered[1][1])
