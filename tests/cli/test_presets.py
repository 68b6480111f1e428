from __future__ import annotations

from itertools import pairwise

import pytest
import yaml

from medim.cli.presets import render_preset
from medim.config import CONFIG_CLASSES, Command, check_config, list_presets, read_config
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
