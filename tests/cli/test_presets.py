from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from medim.cli import app
from medim.cli.presets import START_PRESETS, compare_configs, read_preset_title, render_config, render_preset
from medim.config import (
    CONFIG_CLASSES,
    Command,
    auto_keys,
    check_config,
    dump_config,
    list_presets,
    load_config,
    read_config,
)
from medim.training.auto_config import AUTO_RULES, USUAL_SIZES, resolve_auto
from medim.types import UsageError

SHIPPED: list[tuple[Command, str]] = [(command, name) for command in CONFIG_CLASSES for name in list_presets(command)]


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_a_shown_preset_is_that_preset(command: Command, name: str) -> None:
    shown, shipped = (
        check_config(command, resolve_auto(content, *USUAL_SIZES[content["modality"]]), source=name)
        for content in (yaml.safe_load(render_preset(name)), read_config(command, name))
    )
    assert shown == shipped


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_a_shown_preset_explains_every_key_and_every_option(command: Command, name: str) -> None:
    lines = render_preset(name).splitlines()
    assert max(len(line) for line in lines[3:]) <= 120
    for above, line in pairwise(lines):
        if line and not line.lstrip().startswith("#"):
            assert above.lstrip().startswith("#"), line
    keys = {line.partition(":")[0] for line in lines}
    assert set(CONFIG_CLASSES[command].model_fields) <= keys


def test_what_follows_the_images_is_shown_with_its_rule() -> None:
    text = " ".join(render_preset("mri-segmentation").replace("#", " ").split())
    assert text.count(": auto") == 4
    for key in ("resample.spacing", "views.shape", "encoder.channels", "inference.roi"):
        assert f"auto: {AUTO_RULES[key]}" in text


def test_a_preset_is_shown_under_its_old_name_too() -> None:
    assert render_preset("small-2d-vae") == render_preset("test-2d-vae")


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="'xray-28'"):
        render_preset("xray_28")


def test_the_list_begins_with_five_presets_and_has_all_on_request() -> None:
    lines = CliRunner().invoke(app, ["config", "list"]).output.splitlines()
    assert [tuple(line.split()[:2]) for line in lines[1:6]] == list(START_PRESETS)
    assert len(lines) == 7
    assert lines[-1] == f"{len(SHIPPED) - 5} more: medim config list --all"
    listed = CliRunner().invoke(app, ["config", "list", "--all"]).output
    assert all(name in listed.split() for _, name in SHIPPED)


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_the_title_of_a_preset_is_a_whole_sentence(command: Command, name: str) -> None:
    title = read_preset_title(list_presets(command)[name])
    assert title.endswith(".")
    assert 10 < len(title) < 200


def test_a_copied_file_is_the_same_configuration_and_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    assert CliRunner().invoke(app, ["config", "copy", "mri-crop", str(file)]).exit_code == 0
    assert load_config("pretrain", str(file)) == load_config("pretrain", "mri-crop")
    assert compare_configs("mri-crop", str(file)) == {}
    file.write_text(file.read_text().replace("max_steps: 700", "max_steps: 70"))
    assert compare_configs("mri-crop", str(file)) == {"max_steps": "700 -> 70"}
    assert "max_steps: 70\n" in render_config(str(file))
    again = CliRunner().invoke(app, ["config", "copy", "mri", str(file)])
    assert again.exit_code == 1
    assert "this file exists" in again.output


def test_own_files_and_runs_are_shown_like_presets(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("{extends: mri-segmentation, max_steps: 3}")
    assert "max_steps: 3\n" in render_config(str(tmp_path / "short.yaml"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(load_config("pretrain", "mri-crop")))
    assert compare_configs(str(run), "mri-crop") == {}
    (tmp_path / "wrong.yaml").write_text("{extends: mri, max_stepz: 3}")
    with pytest.raises(UsageError, match="Did you mean 'max_steps'"):
        render_config(str(tmp_path / "wrong.yaml"))


def test_auto_values_are_resolved_for_images(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (4, 40, 40), np.uint8)
    arrays = {f"{part}_images": images for part in ("train", "val")}
    arrays |= {f"{part}_labels": np.zeros((4, 1), np.uint8) for part in ("train", "val")}
    np.savez(tmp_path / "noise.npz", **arrays)
    shown = CliRunner().invoke(app, ["config", "show", "xray", "--data", str(tmp_path / "noise.npz"), "--quiet"])
    assert shown.exit_code == 0, shown.output
    content = yaml.safe_load(shown.output)
    assert auto_keys(content) == []
    assert max(content["views"]["shape"]) <= 48


@pytest.mark.parametrize(
    "text",
    [
        "modality: mri\nviews: 5\n",
        "modality: mri\npreprocessing: [ras]\n",
        "extends: mri\nencoder: none\n",
        "extends: mri\nmax_steps: abc\n",
        "extends: mri\nobjectives: {a: 1}\n",
        "extends: mri\nobjectives: [local]\n",
        "extends: mri\nviews: null\n",
        "extends: mri-segmentation\nhead: 3\ndecoder: []\n",
    ],
)
@pytest.mark.parametrize("command", ["show", "diff", "copy"])
def test_a_file_with_a_value_of_the_wrong_form_is_refused_in_one_sentence(
    text: str, command: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    rest = {"show": [], "diff": ["mri"], "copy": [str(tmp_path / "copy.yaml")]}[command]
    result = CliRunner().invoke(app, ["config", command, str(path), *rest])
    assert result.exit_code == 2, result.output
    assert "unexpected error" not in result.output
    assert not (tmp_path / "copy.yaml").exists()
