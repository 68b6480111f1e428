from __future__ import annotations

from pathlib import Path

from medim.config import PretrainConfig
from medim.training.pretrain.figures import HistoryRow, draw_phantom_views, draw_training_figures


def test_losses_rank_and_phantom_views_are_drawn(pretrain_config: PretrainConfig, tmp_path: Path) -> None:
    rows: list[HistoryRow] = [(step, "local_dim", 7.0 - step, 7.3, None) for step in range(4)]
    rows += [(3, "local_dim", None, None, 5.0), (3, "rankme", None, None, 2.5)]
    files = [*draw_training_figures(tmp_path, rows), draw_phantom_views(tmp_path, pretrain_config)]
    assert [file.name for file in files] == ["losses.svg", "rankme.svg", "phantom.png"]
    assert all(file.stat().st_size > 1000 for file in files)
    assert all(word in files[0].read_text() for word in ("local_dim", "chance", "held out"))
    assert "local_dim" not in files[1].read_text()


def test_a_chance_level_of_zero_is_drawn_as_any_other(tmp_path: Path) -> None:
    files = draw_training_figures(tmp_path, [(1, "local_dim", -0.2, 0.0, None)])
    assert "chance" in files[0].read_text()


def test_a_rank_that_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    files = draw_training_figures(tmp_path, [(1, "local_dim", 7.0, 7.3, None)])
    assert [file.name for file in files] == ["losses.svg"]
