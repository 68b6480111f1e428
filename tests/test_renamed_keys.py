"""Configurations with the key names of earlier versions."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import yaml

from medim import renamed_keys
from medim.config import (
    Command,
    PretrainConfig,
    RunConfig,
    Section,
    ViewsConfig,
    apply_overrides,
    check_config,
    dump_config,
    list_presets,
    load_config,
    read_config,
    validate_section,
)
from medim.models.critics import CRITICS
from medim.objectives import OBJECTIVES
from medim.renamed_keys import CONFIG_KEYS, CONFIG_PRESETS, CONFIG_VALUES, RUN, translate_config
from medim.training.run_folder import read_run_config, write_config
from medim.types import UsageError, UserError

BASE: Section = {
    "modality": "xray",
    "preprocessing": [],
    "views": {"shape": [32, 32], "count": 2},
    "encoder": {"name": "unet", "channels": [4, 8]},
    "max_steps": 10,
    "batch_size": 4,
    "lr": 0.001,
}
FULL: dict[Command, Section] = {
    "pretrain": {**BASE, "objectives": [{"name": "local_dim"}]},
    "finetune": {**BASE, "task": "classification", "head": {"name": "classification"}},
}
MULTISTEP = {"schedule": "multistep", "lr_milestones": [5]}
# command, content in old names, the same in new names, overrides in old names
CASES: list[tuple[Command, Section, Section, list[str]]] = [
    ("pretrain", {"schedule": "steps", "lr_milestones": [5]}, MULTISTEP, ["lr_milestones=[5]", "schedule=steps"]),
    ("finetune", {"schedule": "multistep", "drop_at": [5]}, MULTISTEP, ["drop_at=[5]", "schedule=multistep"]),
    ("pretrain", {"encode_in_chunks_of": 2}, {"gradient_cache_chunk": 2}, ["encode_in_chunks_of=2"]),
    ("finetune", {"measure_at": [2, 4]}, {"eval_steps": [2, 4]}, ["measure_at=[2, 4]"]),
    (
        "pretrain",
        {"select_without_labels": True},
        {"checkpoint_selection": "loss"},
        ["select_without_labels=true"],
    ),
    (
        "pretrain",
        {"select_without_labels": False},
        {"checkpoint_selection": "probe"},
        ["select_without_labels=false"],
    ),
    (
        "pretrain",
        {"views": {**BASE["views"], "same_place": False}},
        {"views": {**BASE["views"], "same_crop": False}},
        ["views.same_place=false"],
    ),
]
IDS = [case[3][0] for case in CASES]
OPTIONS = {"level": 0, "standardise": True, "see_summary": False, "scaled": True, "hidden": 0.5, "block": 4}
# entry of a table, old option, new option
ENTRY_OPTIONS = [
    (entry, old, new)
    for entry, names in CONFIG_KEYS.items()
    if entry not in (RUN, "views")
    for old, new in names.items()
]
# section with an old key and a new one, and where it is in a configuration
BOTH: list[Section] = [
    {"drop_at": [5], "lr_milestones": [6]},
    {"views": {"shape": [8, 8], "same_place": True, "same_crop": True}},
]


@pytest.fixture(autouse=True)
def every_warning(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Warn again about names that an earlier test used."""
    renamed_keys._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "medim")
    yield
    renamed_keys._warn_once.cache_clear()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Warnings about old names since the last call."""
    messages = [record.getMessage() for record in caplog.records if record.name == renamed_keys.log.name]
    caplog.clear()
    renamed_keys._warn_once.cache_clear()
    return messages


def build_config(command: Command, changes: Section) -> RunConfig:
    return check_config(command, {**FULL[command], **changes}, source="here")


def list_old_names() -> set[tuple[str, str]]:
    """Section and name of every old key, and of every key with old values."""
    keys = {(section, key) for section, names in CONFIG_KEYS.items() for key in names}
    return keys | {(section, key) for section, values in CONFIG_VALUES.items() for key in values}


def walk_keys(content: Section) -> Iterator[tuple[str, str]]:
    """Section and name of the keys of a configuration and of its views."""
    for key, value in content.items():
        yield RUN, key
        if key == "views":
            yield from (("views", inner) for inner in value)


def objective_of(entry: str, **options: Any) -> Section:
    """An objective with options, or an objective with a critic with options."""
    section = {"name": entry, **options}
    return section if entry in OBJECTIVES else {"name": "local_dim", "critic": section}


def test_the_cases_of_this_module_contain_every_old_name() -> None:
    cases = {key for _, old, _, _ in CASES for key in walk_keys(old)}
    assert list_old_names() <= cases | {(entry, old) for entry, old, _ in ENTRY_OPTIONS}


@pytest.mark.parametrize(("command", "old", "new", "assignments"), CASES, ids=IDS)
def test_an_old_name_is_the_new_one_with_a_warning_in_files_overrides_and_python(
    command: Command,
    old: Section,
    new: Section,
    assignments: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = build_config(command, {**new, "name": "run"})
    assert warnings_of(caplog) == []
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**FULL[command], **old}))
    from_file = load_config(command, str(path))
    file_warnings = warnings_of(caplog)
    path.write_text(yaml.safe_dump(FULL[command]))
    from_overrides = load_config(command, str(path), assignments)
    override_warnings = warnings_of(caplog)
    from_python = type(expected)(**{**FULL[command], **old, "name": "run"})
    python_warnings = warnings_of(caplog)
    assert from_file == from_overrides == from_python == expected
    assert from_file.hash == from_overrides.hash == from_python.hash == expected.hash
    assert len(file_warnings) == 1
    assert "will be removed in the next release" in file_warnings[0]
    assert file_warnings == override_warnings == python_warnings


@pytest.mark.parametrize(("entry", "old", "new"), ENTRY_OPTIONS)
def test_an_old_option_of_an_entry_is_the_new_one_with_a_warning_in_files_overrides_and_python(
    entry: str, old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = OPTIONS[old]
    expected = build_config("pretrain", {"objectives": [objective_of(entry, **{new: value})], "name": "run"})
    assert warnings_of(caplog) == []
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**FULL["pretrain"], "objectives": [objective_of(entry, **{old: value})]}))
    configs = [load_config("pretrain", str(path))]
    warnings = [warnings_of(caplog)]
    path.write_text(yaml.safe_dump({**FULL["pretrain"], "objectives": [objective_of(entry)]}))
    place = "objectives.0" if entry in OBJECTIVES else "objectives.0.critic"
    for assignment in (
        f"{place}.{old}={json.dumps(value)}",
        f"objectives=[{json.dumps(objective_of(entry, **{old: value}))}]",
        f"objectives.0={json.dumps(objective_of(entry, **{old: value}))}",
    ):
        configs.append(load_config("pretrain", str(path), [assignment]))
        warnings.append(warnings_of(caplog))
    content = {**FULL["pretrain"], "name": "run", "objectives": [objective_of(entry, **{old: value})]}
    configs.append(PretrainConfig(**content))
    warnings.append(warnings_of(caplog))
    table = {**OBJECTIVES, **CRITICS}
    run_args = set(signature(table[entry]).parameters) - {new}
    bound = [validate_section(table, {"name": entry, key: value}, run_args=run_args) for key in (old, new)]
    warnings.append(warnings_of(caplog))
    assert all(config == expected for config in configs)
    assert bound[0] == bound[1] == (table[entry], {new: value})
    assert warnings == [
        [f"{entry}.{old} is now {entry}.{new}; the old name will be removed in the next release."]
    ] * len(warnings)


@pytest.mark.parametrize(("entry", "old", "new"), ENTRY_OPTIONS)
def test_an_old_option_is_refused_beside_the_new_one_and_for_other_entries(entry: str, old: str, new: str) -> None:
    value = OPTIONS[old]
    remedy = rf"{old}: this key is now {new}, and both are given\. Remove {old}\."
    with pytest.raises(UsageError, match=remedy):
        build_config("pretrain", {"objectives": [objective_of(entry, **{old: value, new: value})]})
    table = {**OBJECTIVES, **CRITICS}
    with pytest.raises(UsageError, match=remedy):
        validate_section(table, {"name": entry, old: value, new: value})
    with pytest.raises(UsageError, match=rf"vae: no option '{old}'\..*There are: .*beta"):
        validate_section(table, {"name": "vae", old: value})


def test_a_width_called_hidden_keeps_its_name(caplog: pytest.LogCaptureFixture) -> None:
    objectives = [{"name": "coordinates", "hidden": 8}, {"name": "prior_matching", "hidden": [8]}]
    config = build_config("pretrain", {"objectives": objectives})
    assert isinstance(config, PretrainConfig)
    assert config.objectives == objectives
    assert warnings_of(caplog) == []


def test_a_warning_names_both_and_comes_once_per_process(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        build_config("pretrain", {"select_without_labels": True})
    assert warnings_of(caplog) == [
        "select_without_labels: true is now checkpoint_selection: loss; the old name will be removed in the next "
        "release."
    ]
    ViewsConfig(shape=(8, 8), same_place=False)  # type: ignore[call-arg]
    assert [message.split(";")[0] for message in warnings_of(caplog)] == ["views.same_place is now views.same_crop"]


@pytest.mark.parametrize("both", BOTH)
def test_the_old_and_the_new_name_together_are_refused(both: Section, tmp_path: Path) -> None:
    section = next((value for value in both.values() if isinstance(value, dict)), both)
    old_key = next(key for key in section if key in {name for _, name in list_old_names()})
    remedy = rf"{old_key}: this key is now (\w+), and both are given\. Remove {old_key}\."
    path = tmp_path / "both.yaml"
    path.write_text(yaml.safe_dump({**FULL["pretrain"], **both}))
    with pytest.raises(UsageError, match=remedy) as error:
        load_config("pretrain", str(path))
    assert str(path) in str(error.value)
    assert error.value.exit_code == 2
    with pytest.raises(UsageError, match=remedy):
        build_config("pretrain", both)


@pytest.mark.parametrize("order", [1, -1])
def test_overrides_with_the_old_and_the_new_name_are_refused(order: int) -> None:
    with pytest.raises(UsageError, match=r"are names of one key\. Use same_crop only\."):
        apply_overrides(FULL["pretrain"], ["views.same_place=true", "views.same_crop=false"][::order])


def test_an_override_replaces_the_value_of_a_file_in_either_spelling(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("extends: xray-28\nviews: {same_place: true}\nencode_in_chunks_of: 4\n")
    for assignments in (["views.same_crop=false", "gradient_cache_chunk=8"], ["views.same_place=false"]):
        config = load_config("pretrain", str(path), assignments)
        assert not config.views.same_crop
        assert config.gradient_cache_chunk == (8 if len(assignments) == 2 else 4)


def test_an_override_of_an_item_is_translated_before_the_next_override() -> None:
    assignments = ["objectives.0={name: cpc, level: 1, scaled: true}", "objectives.0.feature_level=0"]
    objective = {"name": "cpc", "feature_level": 0, "scale_scores": True}
    assert apply_overrides(FULL["pretrain"], assignments)["objectives"] == [objective]


def test_the_reference_page_lists_every_old_name() -> None:
    page = (Path(__file__).parent.parent / "docs" / "reference" / "config.md").read_text()
    rows = [line for line in page.split("## Renamed keys")[1].splitlines() if line.startswith("| `")]
    pairs = {(old, new) for names in CONFIG_KEYS.values() for old, new in names.items()}
    for old, new in pairs:
        assert [row for row in rows if f"`{old}" in row.split("|")[1] and f"`{new}" in row.split("|")[2]], (old, new)


def test_a_file_that_extends_one_of_an_earlier_version_replaces_its_values(tmp_path: Path) -> None:
    old, mine = tmp_path / "old.yaml", tmp_path / "run.yaml"
    old.write_text("extends: xray-28\nschedule: steps\ndrop_at: [5]\n")
    mine.write_text(f"extends: {old}\nlr_milestones: [7]\n")
    assert load_config("pretrain", str(mine)).lr_milestones == (7,)
    assert read_config("pretrain", str(old))["lr_milestones"] == [5]


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [({"drop_att": [5]}, "max_steps"), ({"encode_in_chunks": 3}, "encoder"), ({"same_place": True}, "batch_size")],
)
def test_an_unknown_key_is_refused_with_all_new_names(changes: Section, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"no key '{next(iter(changes))}'.*There are: .*{nearest}") as error:
        build_config("pretrain", changes)
    assert "lr_milestones" in str(error.value)
    assert not {key for _, key in list_old_names() - {(RUN, "schedule")}} & set(str(error.value).split("There are")[1])


def test_a_key_of_another_command_is_unknown_under_its_old_name_too() -> None:
    with pytest.raises(UsageError, match="no key 'eval_steps'"):
        build_config("pretrain", {"measure_at": [2]})


def test_a_value_of_the_wrong_type_is_refused_under_an_old_name_too() -> None:
    with pytest.raises(UsageError, match="checkpoint_selection: expected probe or loss, got 'maybe'"):
        build_config("pretrain", {"select_without_labels": "maybe"})
    with pytest.raises(UsageError, match=r"checkpoint_selection: .*got True"):
        build_config("pretrain", {"checkpoint_selection": True})
    with pytest.raises(UsageError, match=r"schedule: .*got 'stairs'"):
        build_config("pretrain", {"schedule": "stairs"})


@pytest.mark.parametrize(("old", "new"), CONFIG_PRESETS.items())
def test_the_old_name_of_a_preset_is_the_preset_with_a_warning(
    old: str, new: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert new in list_presets("pretrain")
    expected = load_config("pretrain", new)
    assert warnings_of(caplog) == []
    assert load_config("pretrain", old) == expected
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: {old}\nmax_steps: 70\n")
    assert load_config("pretrain", str(path)) == expected.model_copy(update={"name": "run", "max_steps": 70})
    assert [message.split(";")[0] for message in warnings_of(caplog)] == [f"preset {old} is now {new}"]


def test_a_preset_of_this_version_has_no_old_name_and_an_unknown_one_is_refused() -> None:
    presets = set(list_presets("pretrain"))
    assert {name for name in presets if name.startswith("test-")} == set(CONFIG_PRESETS.values())
    assert not presets & set(CONFIG_PRESETS)
    with pytest.raises(UsageError, match=r"no preset or file 'small-2d-mae'\. `medim config list") as error:
        load_config("pretrain", "small-2d-mae")
    assert "test-" not in str(error.value)


def test_a_run_of_a_preset_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    path, config = tmp_path / "config.yaml", load_config("pretrain", "test-2d-local-dim")
    recorded = yaml.safe_load(dump_config(config)) | {"name": "small-2d-local-dim"}
    path.write_text(yaml.safe_dump(recorded))
    write_config(tmp_path, config, seed=0)
    assert yaml.safe_load(path.read_text())["name"] == "test-2d-local-dim"


# `config.yaml` of a pretraining run, written by the version of commit b8dc2eb
OLD_RUN = """\
name: xray-28
modality: xray
preprocessing: []
views:
  shape: [32, 32]
  count: 2
  same_place: true
  augmentations: []
encoder:
  name: unet
  channels: [4, 8]
max_steps: 10
batch_size: 4
lr: 0.001
optimiser: adamw
betas: [0.9, 0.999]
schedule: steps
drop_at: [5]
warmup_steps: 0
weight_decay: 0.01
gradient_clip: 1.0
checkpoint_every_steps: 100
precision: 32-true
workers: 0
prefetch: 2
objectives:
- name: local_dim
  level: 0
  standardise: true
  critic: {name: encode_and_dot, scaled: true}
decoder: null
encode_in_chunks_of: 2
compile: false
select_without_labels: true
"""


def test_a_run_of_an_earlier_version_is_resumed_and_gets_the_new_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(OLD_RUN)
    objective = {"name": "local_dim", "feature_level": 0, "batch_norm_summary": True}
    options = {"name": "xray-28", "gradient_cache_chunk": 2, "checkpoint_selection": "loss", **MULTISTEP}
    options["objectives"] = [{**objective, "critic": {"name": "encode_and_dot", "scale_scores": True}}]
    config = build_config("pretrain", options)
    other = build_config("pretrain", {**options, "lr_milestones": [6]})
    with pytest.raises(UserError, match="--resume needs the same configuration"):
        write_config(tmp_path, other, seed=0)
    assert path.read_text() == OLD_RUN
    write_config(tmp_path, config, seed=0)
    assert warnings_of(caplog) == [], "nobody can change a recorded file"
    content = yaml.safe_load(path.read_text())
    assert content["lr_milestones"] == [5]
    assert translate_config(content, warn=False) == content
    assert read_run_config(path, PretrainConfig) == config


def test_a_damaged_configuration_of_a_run_is_not_that_of_any_run(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for text in ("[1]", "a: [", OLD_RUN.replace("drop_at", "drop_att"), OLD_RUN + "lr_milestones: [5]\n"):
        path.write_text(text)
        assert read_run_config(path, PretrainConfig) is None
    assert read_run_config(tmp_path / "none.yaml", PretrainConfig) is None
