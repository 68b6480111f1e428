"""The spec of a network: the same JSON after reading and writing, and one sentence for a file that lacks a key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from medim.model_spec import ModelSpec, NetworkSpec, read_spec
from medim.types import UserError

SIZES: dict[str, Any] = {"spatial_dims": 3, "in_channels": 1, "input_shape": [8, 8, 8]}
PROVENANCE = {"config_hash": "ab", "index_hash": "cd", "seed": 1, "split_seed": 0, "parent": None, "medim": "0.1.0"}
START: dict[str, Any] = {"schema_version": 2, "kind": "encoder", "modality": "mri", **SIZES}
ENCODER: dict[str, Any] = {
    **START,
    "encoder": {"name": "unet", "channels": [4, 8]},
    "preprocessing": [{"op": "ras"}],
    "inference": {"mode": "whole"},
    "classes": [],
    "preset": "mri",
    "provenance": {**PROVENANCE, "torch": "2"},
    "decoder": None,
    "checkpoint_selection": {"step": 3, "n_labels": 60},
    "channels": [4, 8],
    "strides": [1, 2],
    "summary_channels": 8,
    "receptive_field_voxels": [5, 9],
    "receptive_field_mm": None,
    "added_later": {"a": 1},
    "sha256": "ef",
}
MODEL: dict[str, Any] = {
    **{key: ENCODER[key] for key in list(ENCODER)[: list(ENCODER).index("decoder")]},
    "kind": "segmenter",
    "classes": ["grey", "white"],
    "decoder": {"name": "unet"},
    "head": {"name": "segmentation"},
    "out_channels": 3,
    "sha256": "ef",
}


@pytest.mark.parametrize("content", [ENCODER, MODEL], ids=["encoder", "model"])
def test_a_spec_is_written_as_it_was_read_with_keys_of_a_later_version(content: dict[str, Any]) -> None:
    spec = ModelSpec.from_json(content, "x.json")
    assert json.dumps(spec.to_json()) == json.dumps(content)
    assert spec.provenance.versions == {"medim": "0.1.0", "torch": "2"}
    assert spec.input_shape == (8, 8, 8)
    assert spec.n_selection_labels == (60 if spec.is_encoder else 0)


@pytest.mark.parametrize("key", ["kind", "modality", "preprocessing", "encoder", "in_channels", "head", "classes"])
def test_a_file_that_lacks_a_key_is_refused_by_file_and_key(key: str, tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps({name: value for name, value in MODEL.items() if name != key}))
    expected = rf"{re.escape(str(file))}: expected the key '{key}' .*which is missing \(written by medim 0\.1\.0\)\."
    with pytest.raises(UserError, match=expected):
        read_spec(file)
    file.write_text(json.dumps({**MODEL, key: None}))
    with pytest.raises(UserError, match=f"expected the key '{key}' .*got None"):
        read_spec(file)


def test_a_network_is_built_from_a_part_of_the_keys() -> None:
    spec = NetworkSpec.from_json({"encoder": {"name": "unet"}, **SIZES}, "bundle")
    assert (spec.encoder, spec.decoder, spec.head) == ({"name": "unet"}, None, None)
    with pytest.raises(UserError, match="bundle: expected the key 'encoder'"):
        NetworkSpec.from_json(SIZES, "bundle")


def test_the_keys_of_the_file_work_for_one_more_release_with_a_warning() -> None:
    spec = ModelSpec.from_json(ENCODER, "x.json")
    with pytest.warns(DeprecationWarning, match=r"use spec\.preprocessing"):
        assert spec["preprocessing"] == [{"op": "ras"}]
    with pytest.warns(DeprecationWarning, match="no_such_key"), pytest.raises(KeyError):
        spec["no_such_key"]


def test_the_values_of_the_classes_are_kept_and_one_for_each_class() -> None:
    content = {**MODEL, "class_values": [1, 2035]}
    spec = ModelSpec.from_json(content, "x.json")
    assert spec.class_values == (1, 2035)
    assert spec.to_json()["class_values"] == [1, 2035]
    assert ModelSpec.from_json(MODEL, "x.json").class_values == ()  # of an earlier version: numbers are values
    for values in ([1], [4, 1], [0, 1], [1, 1], [1, 70_000]):
        with pytest.raises(UserError, match=r"class_values"):
            ModelSpec.from_json({**MODEL, "class_values": values}, "x.json")
