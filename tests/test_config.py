"""A misspelt key is an error that names the right one, at every level; what passes is what the constructor takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from medim.config import (
    Command,
    FinetuneConfig,
    PretrainConfig,
    RunConfig,
    Section,
    apply_overrides,
    build_from_section,
    check_config,
    dump_config,
    list_presets,
    load_config,
    read_config,
    unknown_preset_message,
    validate_section,
)
from medim.models.critics import CRITICS
from medim.models.decoders import DECODERS
from medim.models.encoders import ENCODERS
from medim.models.heads import HEADS
from medim.objectives import OBJECTIVES
from medim.training.auto_config import USUAL_SIZES, resolve_auto
from medim.types import UsageError

SHIPPED: list[tuple[Command, str]] = [
    (command, name) for command in ("pretrain", "finetune") for name in list_presets(command)
]
MINIMAL: Section = {
    "modality": "mri",
    "preprocessing": [{"op": "ras"}],
    "views": {"shape": [8, 8, 8]},
    "encoder": {"name": "unet"},
    "objectives": [{"name": "local_dim"}],
    "max_steps": 10,
    "batch_size": 4,
    "lr": 0.001,
}


class Thing:
    """A table's entry."""

    def __init__(
        self,
        channels: tuple[int, ...],
        spatial_dims: int,
        *,
        kind: Literal["a", "b"] = "a",
        width: int = 8,
        rate: float = 0.1,
        sizes: tuple[int, ...] = (1, 2),
        inner: Section = {"name": "x"},  # noqa: B006
    ) -> None:
        self.taken = {**locals()}
        self.taken.pop("self")


class Narrow:
    """An entry that needs nothing of the run."""

    def __init__(self, *, width: int) -> None:
        self.width = width


TABLE: dict[str, Any] = {"thing": Thing, "narrow": Narrow}


def configured(**changes: Any) -> PretrainConfig:
    config = check_config("pretrain", {**MINIMAL, **changes}, source="here")
    assert isinstance(config, PretrainConfig)
    return config


def shipped(command: Command, name: str) -> RunConfig:
    content = read_config(command, name)
    return check_config(command, resolve_auto(content, *USUAL_SIZES[content["modality"]]), source=name)


def test_a_configuration_file_that_may_be_named_after_a_person_has_a_neutral_name(tmp_path: Path) -> None:
    for stem, name in (("Osterwind_export", "config"), ("mri_crop_2", "mri_crop_2"), ("1943-02-12", "config")):
        (tmp_path / f"{stem}.yaml").write_text("extends: test-2d-local-dim\n")
        assert load_config("pretrain", str(tmp_path / f"{stem}.yaml")).name == name
    assert all(read_config("pretrain", name)["name"] == name for name in list_presets("pretrain"))


# --- whole files


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_a_shipped_preset_is_complete_and_carries_its_name(command: Command, name: str) -> None:
    config = shipped(command, name)
    assert config.name == name
    assert config.spatial_dims == (3 if config.modality == "mri" else 2)


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_every_section_of_a_shipped_preset_fits_its_constructor(command: Command, name: str) -> None:
    config = shipped(command, name)
    encoder = ("in_channels", "spatial_dims", "input_shape", "encoders")
    of_maps: tuple[str, ...] = ("channels", "strides", "summary_channels", "spatial_dims", "grids", "input_shape")
    of_maps += ("receptive_fields", "origins")
    of_images = ("in_channels", "decoded_channels", "view_count", "aligned")
    validate_section(ENCODERS, config.encoder, run_args=encoder)
    if isinstance(config, PretrainConfig):
        for section in config.objectives:
            options = {key: value for key, value in section.items() if key != "weight"}
            _, bound = validate_section(OBJECTIVES, options, run_args=(*of_maps, *of_images))
            if "critic" in bound:
                validate_section(CRITICS, bound["critic"], run_args=("channels", "summary_channels"))
    if isinstance(config, FinetuneConfig):
        validate_section(HEADS, config.head, run_args=(*of_maps, "out_channels"))
        assert (config.decoder is not None) == (config.task == "segmentation")
        if config.decoder:
            validate_section(DECODERS, config.decoder, run_args=("channels", "strides", "spatial_dims"))


@pytest.mark.parametrize(("command", "name"), SHIPPED)
def test_a_dumped_config_loads_to_the_same_run(command: Command, name: str, tmp_path: Path) -> None:
    config = shipped(command, name)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    again = load_config(command, str(tmp_path / "config.yaml"))
    assert again == config
    assert again.hash == config.hash


def test_what_changes_no_number_is_not_in_the_hash_and_newer_keys_count_where_they_are_set() -> None:
    assert load_config("pretrain", "mri-crop", ["checkpoint_selection=probe"]).hash == "fdd5d87468b2", (
        "runs and studies keep their names until keys are renamed"
    )
    segmentation = load_config("finetune", "mri-crop-segmentation")
    assert segmentation.hash == segmentation.model_copy(update={"balanced_batches": False}).hash == "72024d73c927"
    assert segmentation.hash != segmentation.model_copy(update={"balanced_batches": True}).hash
    assert configured().hash == configured(workers=3, prefetch=4).hash
    assert configured().hash == configured(compile=False, gradient_cache_chunk=None).hash
    assert configured().hash != configured(checkpoint_selection="probe").hash
    assert len({configured().hash, configured(compile=True).hash, configured(gradient_cache_chunk=8).hash}) == 3
    assert load_config("finetune", "mri-crop-segmentation").hash == "72024d73c927"
    assert load_config("finetune", "mri-crop-segmentation", ["views.foreground_share=0.0"]).hash == "72024d73c927"
    assert load_config("finetune", "mri-crop-segmentation", ["views.foreground_share=0.33"]).hash != "72024d73c927"


def test_a_hash_names_the_configuration() -> None:
    assert configured().hash == configured().hash
    assert len(configured().hash) == 12
    assert configured().hash != configured(max_steps=11).hash
    assert configured().hash != configured(encoder={"name": "unet", "norm": "bn"}).hash


def test_an_unknown_preset_lists_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"mri-corp.*'mri-crop'.*config list --all") as error:
        load_config("pretrain", "mri-corp")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[1, 2]", "a YAML mapping, got list"),
        (b"a: [1", "YAML"),
        (b"\xff\xfe\x00", "text in UTF-8"),
        (b"", "a YAML mapping, got NoneType"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"run\.yaml: expected {reason}"):
        read_config("pretrain", str(path))


def test_a_file_that_extends_a_preset_says_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: xray-28\nviews: {count: 1}\nobjectives: [{name: local_dim}]\n")
    base, mine = read_config("pretrain", "xray-28"), read_config("pretrain", str(path))
    assert mine["name"] == "config"
    assert mine["views"] == {**base["views"], "count": 1}
    assert mine["objectives"] == [{"name": "local_dim"}]
    assert {**mine, "name": 0, "views": 0, "objectives": 0} == {**base, "name": 0, "views": 0, "objectives": 0}


def test_files_that_extend_each_other_in_a_ring_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"extends: {two}\n")
    two.write_text(f"extends: {one}\n")
    with pytest.raises(UsageError, match="Remove one of the two"):
        read_config("pretrain", str(one))


def test_an_extended_preset_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: xray-82\n")
    with pytest.raises(UsageError, match="xray-28"):
        read_config("pretrain", str(path))


@pytest.mark.parametrize("assignment", ["schedule=multistep", "lr_milestones=[5]"])
def test_a_schedule_in_steps_and_its_steps_need_each_other(assignment: str) -> None:
    with pytest.raises(UsageError, match="lr_milestones"):
        check_config("pretrain", apply_overrides(MINIMAL, [assignment]), source="here")


def test_a_preset_of_another_command_is_refused_by_its_keys() -> None:
    content = read_config("finetune", "mri-segmentation")
    with pytest.raises(UsageError, match=r"objectives must be given.*no key 'head'"):
        check_config("pretrain", content, source="mri-segmentation")


# --- keys and values


@pytest.mark.parametrize(
    ("changes", "nearest"),
    [({"max_stepz": 3}, "max_steps"), ({"views": {"shape": [8, 8], "cuont": 2}}, "count"), ({"lrr": 1.0}, "lr")],
)
def test_a_misspelt_key_names_the_nearest(changes: Section, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"Did you mean '{nearest}'.*There are: .*{nearest}"):
        configured(**changes)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 2.5}, "max_steps"),
        ({"lr": -1.0}, "lr"),
        ({"modality": "ct"}, "modality"),
        ({"views": {"shape": [8, 0, 8]}}, r"views\.shape\.1"),
        ({"views": {"shape": [8, 8, 8], "count": 3}}, r"views\.count"),
        ({"precision": "64"}, "precision"),
        ({"encoder": "unet"}, "encoder"),
        ({"objectives": []}, "objectives"),
    ],
)
def test_a_value_of_the_wrong_kind_says_where_and_what_came(changes: Section, where: str) -> None:
    with pytest.raises(UsageError, match=f"config here: {where}: .*got "):
        configured(**changes)


def test_a_missing_key_is_named() -> None:
    content = {key: value for key, value in MINIMAL.items() if key not in ("encoder", "lr")}
    with pytest.raises(UsageError, match=r"encoder must be given\. lr must be given\."):
        check_config("pretrain", content, source="here")


def test_a_value_left_to_the_images_is_not_taken_where_no_image_is_looked_at() -> None:
    with pytest.raises(UsageError, match=r"config here: preprocessing\.0\.spacing, encoder\.channels: no rule"):
        configured(encoder={"name": "unet", "channels": "auto"}, preprocessing=[{"op": "resample", "spacing": "auto"}])
    with pytest.raises(UsageError, match=r"views\.shape.*got 'auto'"):
        load_config("pretrain", "mri")


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        configured().max_steps = 3


# --- assignments


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("max_steps=5", ("max_steps",), 5),
        ("views.shape=[4, 4]", ("views", "shape"), [4, 4]),
        ("views.count=2", ("views", "count"), 2),
        ("objectives.0.weight=0.5", ("objectives", 0, "weight"), 0.5),
        ("preprocessing.0={op: resize, shape: [4, 4]}", ("preprocessing", 0), {"op": "resize", "shape": [4, 4]}),
        ("encoder.name=a=b", ("encoder", "name"), "a=b"),
    ],
)
def test_an_assignment_reaches_the_place_it_names(assignment: str, path: tuple[Any, ...], value: Any) -> None:
    found: Any = apply_overrides(MINIMAL, [assignment])
    for part in path:
        found = found[part]
    assert found == value
    assert yaml.safe_load(yaml.safe_dump(MINIMAL)) == MINIMAL


def test_assignments_leave_the_content_given_untouched_and_apply_in_order() -> None:
    before = yaml.safe_dump(MINIMAL)
    assert apply_overrides(MINIMAL, ["views.count=1", "views.count=2"])["views"]["count"] == 2
    assert yaml.safe_dump(MINIMAL) == before


def test_a_number_in_the_notation_of_every_day_is_a_number() -> None:
    config = check_config("pretrain", apply_overrides(MINIMAL, ["lr=1e-3", "max_steps=7"]), source="here")
    assert (config.lr, config.max_steps) == (1e-3, 7)


@pytest.mark.parametrize(
    ("assignment", "reason"),
    [
        ("max_steps", "expected key=value"),
        ("veiws.count=2", "no key 'veiws'. Did you mean 'views'"),
        ("objectives.1.weight=2", "no key '1'.*There are: local_dim"),
        ("objectives.one=2", "no key 'one'"),
        ("lr.peak=2", "lr is a float without keys"),
        ("lr.a.b=2", "no key 'a'"),
        ("views.shape=[8, 8", "expected YAML"),
    ],
)
def test_an_assignment_that_leads_nowhere_says_where_it_stopped(assignment: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"--set .*{reason}"):
        apply_overrides(MINIMAL, [assignment])


def test_an_item_of_a_list_is_set_by_the_name_of_its_section() -> None:
    content = {
        **MINIMAL,
        "objectives": [{"name": "local_dim"}, {"name": "coordinates", "weight": 0.5}],
        "preprocessing": [{"op": "flip"}, {"op": "flip"}, {"op": "zscore"}],
    }
    assignments = ["objectives.coordinates.weight=2", "objectives.0.weight=3", "preprocessing.zscore={op: minmax}"]
    changed = apply_overrides(content, assignments)
    assert changed["objectives"] == [{"name": "local_dim", "weight": 3}, {"name": "coordinates", "weight": 2}]
    assert changed["preprocessing"][2] == {"op": "minmax"}
    with pytest.raises(UsageError, match=r"no key 'flip'.*There are: 0, 1, zscore"):
        apply_overrides(content, ["preprocessing.flip.axis=1"])


def test_an_unknown_preset_is_answered_by_the_three_nearest_alone() -> None:
    message = unknown_preset_message("preset", "mri-crop-seg", list_presets("finetune"))
    assert "'mri-crop-segmentation'" in message
    assert message.count("mri") == 4
    assert message.endswith("`medim config list --all` lists all.")
    assert "Did you mean" not in unknown_preset_message("preset", "zzz", list_presets("pretrain"))


def test_a_misspelt_assignment_is_caught_by_the_check() -> None:
    with pytest.raises(UsageError, match="Did you mean 'batch_size'"):
        check_config("pretrain", apply_overrides(MINIMAL, ["batchsize=2"]), source="here")


# --- sections and signatures


def test_build_passes_the_options_and_only_what_the_constructor_takes() -> None:
    made = build_from_section(
        TABLE, {"name": "thing", "width": 3, "sizes": [4, 5]}, channels=(1, 2), spatial_dims=3, grids=((1,),)
    )
    assert made.taken == {
        "channels": (1, 2),
        "spatial_dims": 3,
        "kind": "a",
        "width": 3,
        "rate": 0.1,
        "sizes": (4, 5),
        "inner": {"name": "x"},
    }
    assert build_from_section(TABLE, {"name": "narrow", "width": 2}, channels=(1,), spatial_dims=3).width == 2


def test_build_leaves_the_section_as_it_was() -> None:
    section = {"name": "narrow", "width": 2}
    build_from_section(TABLE, section)
    assert section == {"name": "narrow", "width": 2}


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"name": "thingy"}, r"no name 'thingy'\. Did you mean 'thing'.*narrow, thing"),
        ({}, "no name 'None'"),
        ({"name": ["thing"]}, "no name"),
        ({"name": "thing", "wdith": 3}, r"thing: no option 'wdith'\. Did you mean 'width'"),
        ({"name": "thing", "spatial_dims": 2}, "thing: no option 'spatial_dims'"),
        ({"name": "thing", "kind": "c"}, r"thing\.kind: expected a or b, got 'c'\."),
        ({"name": "thing", "width": "wide"}, r"thing\.width: expected an integer, got 'wide'\."),
        ({"name": "thing", "width": 1.5}, r"thing\.width"),
        ({"name": "thing", "sizes": 3}, r"thing\.sizes: expected a list, got 3\."),
        ({"name": "thing", "sizes": [3, "x"]}, r"thing\.sizes\.1: expected an integer, got 'x'\."),
        ({"name": "thing", "inner": "x"}, r"thing\.inner"),
        ({"name": "narrow"}, "narrow: width must be given"),
    ],
)
def test_a_section_that_does_not_fit_the_signature_says_why(section: Section, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        validate_section(TABLE, section, run_args=("channels", "spatial_dims"))


def test_bind_serves_functions_under_another_key() -> None:
    def resize(volume: object, *, shape: tuple[int, ...]) -> None: ...

    function, options = validate_section(
        {"resize": resize}, {"op": "resize", "shape": [2, 3]}, key="op", run_args=("volume",)
    )
    assert function is resize
    assert options == {"shape": (2, 3)}


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("lr=true", "lr"),
        ("batch_size=true", "batch_size"),
        ("views.count=true", "views.count"),
        ("betas=[true, 0.9]", "betas.0"),
    ],
)
def test_a_boolean_is_no_number(assignment: str, path: str) -> None:
    with pytest.raises(UsageError, match=rf"{path}: expected .*, got (true or false|True)"):
        load_config("pretrain", "mri-crop", [assignment])


def test_a_boolean_in_a_section_is_no_number() -> None:
    def build(channels: tuple[int, ...], *, bias: bool = False) -> None:
        """A constructor."""

    validate_section({"a": build}, {"name": "a", "channels": [4], "bias": True})
    with pytest.raises(UsageError, match=r"a\.channels\.1: expected a number, got true or false"):
        validate_section({"a": build}, {"name": "a", "channels": [4, True]})
