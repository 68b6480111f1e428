"""What is kept comes back, and what was damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from medim.files import file_sha256, read_json, write_json
from medim.integrity import PackageError, write_sums
from medim.models.model import build_encoder, build_model
from medim.models.serialization import load_encoder, load_model, load_weights, locate_weights, save_model
from medim.types import UserError
from tests.specs import make_spec

SPEC: dict[str, Any] = {
    "encoder": {"name": "unet", "channels": [4, 8], "summary_channels": 6},
    "decoder": None,
    "head": {"name": "classification"},
    "in_channels": 1,
    "out_channels": 2,
    "spatial_dims": 2,
    "input_shape": [8, 8],
    "preprocessing": [{"op": "ras"}],
}
IMAGE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def encoder_run(folder: Path) -> torch.nn.Module:
    torch.manual_seed(1)
    encoder = build_encoder(make_spec(SPEC)).eval()
    save_model(folder / "encoder", "encoder", encoder, make_spec({"kind": "encoder", **SPEC}))
    return encoder


def model_run(folder: Path) -> torch.nn.Module:
    torch.manual_seed(2)
    model = build_model(make_spec(SPEC)).eval()
    save_model(folder / "model", "model", model, make_spec({"kind": "classifier", **SPEC}))
    return model


def test_the_json_says_how_to_build_and_feed_the_weights_and_what_they_hash_to(tmp_path: Path) -> None:
    encoder_run(tmp_path)
    spec = read_json(tmp_path / "encoder" / "encoder.json")
    assert spec["schema_version"] == 2
    assert {key: spec[key] for key in SPEC} == SPEC
    assert spec["sha256"] == file_sha256(tmp_path / "encoder" / "encoder.safetensors")


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        encoder_run(tmp_path / name)
    one, two = ((tmp_path / name / "encoder" / "encoder.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    header = json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")])
    assert "__metadata__" not in header


@pytest.mark.parametrize("inside", ["", "encoder"])
def test_an_encoder_is_found_from_its_run_and_from_its_own_folder(inside: str, tmp_path: Path) -> None:
    encoder = encoder_run(tmp_path)
    again: Any = load_encoder(str(tmp_path / inside))
    assert torch.equal(again(IMAGE).summary, encoder(IMAGE).summary)
    assert not again.training
    assert again.spec.preprocessing == ({"op": "ras"},)


def test_a_fine_tuned_run_gives_its_model_and_its_models_encoder(tmp_path: Path) -> None:
    model: Any = model_run(tmp_path)
    again, spec = load_model(tmp_path)
    assert spec.kind == "classifier"
    assert torch.equal(again(IMAGE), model(IMAGE))
    assert torch.equal(load_encoder(tmp_path)(IMAGE).summary, model.encoder(IMAGE).summary)


def test_a_package_is_read_like_a_run(tmp_path: Path) -> None:
    model = model_run(tmp_path)
    (tmp_path / "package" / "models").mkdir(parents=True)
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "package" / "models" / "model.safetensors")
    write_json(tmp_path / "package" / "medim.json", {"architecture": read_json(tmp_path / "model" / "model.json")})
    with pytest.raises(PackageError, match="SHA256SUMS"):
        load_model(tmp_path / "package")
    write_sums(tmp_path / "package")
    assert torch.equal(load_model(tmp_path / "package")[0](IMAGE), model(IMAGE))


def test_an_encoder_alone_is_no_model(tmp_path: Path) -> None:
    encoder_run(tmp_path)
    with pytest.raises(UserError, match=r"got an encoder\. Run `medim finetune --encoder"):
        load_model(tmp_path)


def test_an_empty_folder_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a finished run.* Check the path, or finish the run with --resume\."):
        locate_weights(tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_weights_that_are_not_those_that_were_written_are_refused(damage: str, tmp_path: Path) -> None:
    encoder_run(tmp_path)
    weights = tmp_path / "encoder" / "encoder.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    else:
        data[-1] ^= 1
        weights.write_bytes(data if damage == "flipped" else data[:-4])
    with pytest.raises(UserError, match="missing" if damage == "missing" else "sha256 differs from the recorded one"):
        load_encoder(tmp_path)


def test_a_file_that_is_no_safetensors_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04pickle" * 10)
    with pytest.raises(UserError, match="expected a safetensors file"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "w.safetensors")


@pytest.mark.parametrize("steps", [[{"op": "nosuch"}], [{"op": "normalise", "method": 5}], [{"op": "resample"}]])
def test_preprocessing_that_this_version_cannot_run_is_refused_by_the_name_of_the_file(
    steps: list[dict[str, object]], tmp_path: Path
) -> None:
    encoder_run(tmp_path)
    file = tmp_path / "encoder" / "encoder.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "preprocessing": steps}))
    with pytest.raises(UserError, match=r"encoder\.json: .*(op|normalise|resample)"):
        load_encoder(tmp_path)


def test_a_package_without_its_contract_is_an_invalid_package(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    write_sums(tmp_path)
    with pytest.raises(PackageError, match=r"medim\.json"):
        locate_weights(tmp_path)


def test_weights_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path, "w", torch.nn.Linear(2, 3), {"kind": "x"})
    with pytest.raises(UserError, match=r"(?s)do not fit this network.*weight"):
        load_weights(torch.nn.Linear(3, 3), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="do not fit"):
        load_weights(torch.nn.Linear(2, 3, bias=False), tmp_path / "w.safetensors")


def test_a_prefix_takes_a_part_of_the_weights(tmp_path: Path) -> None:
    model: Any = model_run(tmp_path)
    encoder = build_encoder(make_spec(SPEC)).eval()
    load_weights(encoder, tmp_path / "model" / "model.safetensors", prefix="encoder.")
    assert torch.equal(encoder(IMAGE).summary, model.encoder(IMAGE).summary)


def test_running_statistics_travel_with_the_weights(tmp_path: Path) -> None:
    norm = torch.nn.BatchNorm1d(3)
    norm(5 + torch.randn(8, 3))
    save_model(tmp_path, "norm", norm, {"kind": "x"})
    assert set(safetensors.torch.load_file(tmp_path / "norm.safetensors")) == set(norm.state_dict())
    again = torch.nn.BatchNorm1d(3)
    load_weights(again, tmp_path / "norm.safetensors")
    assert torch.equal(again.running_mean, norm.running_mean)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(value: float, tmp_path: Path) -> None:
    encoder = encoder_run(tmp_path / "good")
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0] = value
    with pytest.raises(UserError, match="1 weights are NaN or infinite, so the training has diverged"):
        save_model(tmp_path / "bad" / "encoder", "encoder", encoder, make_spec({"kind": "encoder", **SPEC}))
    assert not (tmp_path / "bad").exists()
    weights = tmp_path / "good" / "encoder" / "encoder.safetensors"
    safetensors.torch.save_file(encoder.state_dict(), weights)
    spec = weights.with_name("encoder.json")
    write_json(spec, {**read_json(spec), "sha256": file_sha256(weights)})
    with pytest.raises(UserError, match=r"encoder\.safetensors: 1 weights are NaN or infinite"):
        load_encoder(tmp_path / "good")


class SharedEncoder(torch.nn.Module):
    """Two names for one layer, and a buffer that is a part of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 2, 3)
        self.again = self.first
        self.register_buffer("whole", torch.arange(6.0))
        self.register_buffer("part", self.whole[:4])


def test_a_tensor_with_two_names_is_written_once_and_loaded_under_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved, other = SharedEncoder(), SharedEncoder()
    save_model(tmp_path, "encoder", saved, {"kind": "encoder"})
    tensors = safetensors.torch.load_file(tmp_path / "encoder.safetensors")
    assert set(tensors) == {"first.weight", "first.bias", "whole", "part"}
    load_weights(other, tmp_path / "encoder.safetensors")
    assert torch.equal(other.again.weight, saved.first.weight)
    assert other.again is other.first
    inside = torch.nn.ModuleDict({"encoder": SharedEncoder()})
    save_model(tmp_path, "model", inside, {"kind": "classifier"})
    load_weights(other, tmp_path / "model.safetensors", prefix="encoder.")
    assert torch.equal(other.first.weight, inside["encoder"].again.weight)


def test_weights_without_a_shared_tensor_are_refused(tmp_path: Path) -> None:
    state = SharedEncoder().state_dict()
    safetensors.torch.save_file({"whole": state["whole"]}, tmp_path / "encoder.safetensors")
    with pytest.raises(UserError, match="the weights do not fit this network"):
        load_weights(SharedEncoder(), tmp_path / "encoder.safetensors")
