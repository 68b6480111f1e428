from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle.config_parser import ConfigParser

from medim.export import monai_native
from medim.export.export import export
from medim.export.monai_bundle import (
    CHECKPOINT,
    INFERENCE,
    METADATA,
    _build_value_mapping,
    build_inference_config,
)
from medim.export.monai_native import check_monai_preprocessing, to_monai_transforms
from medim.export.offline import network_isolation_command
from medim.models.serialization import load_model
from medim.package.contract import GOLDEN
from medim.package.golden import GoldenInput, make_phantom
from medim.package.package import Package
from medim.types import UserError, Volume
from tests.export.packages import STEPS_3D, make_run

DEEPER = {"name": "unet", "channels": [4, 8, 8]}  # DynUNet has three levels at least
# MONAI alone: whoever imports medim fails.
ALONE = "import runpy, sys; sys.modules['medim'] = None; runpy.run_module('monai.bundle', run_name='__main__')"
WITH_MEDIM = "import runpy; runpy.run_module('monai.bundle', run_name='__main__')"


@pytest.fixture(scope="module")
def deeper(place: Path) -> Path:
    return make_run(place / "runs" / "deeper", "segmenter", encoder=DEEPER)


@pytest.fixture(scope="module")
def native(place: Path, deeper: Path) -> Package:
    return export(deeper, place / "packages-for-monai" / "segmenter")


def texts(content: Any) -> Iterator[str]:
    """Every text of a JSON content."""
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from texts(part)
    elif isinstance(content, str):
        yield content


def built(package: Package) -> torch.nn.Module:
    """The bundle's network with the bundle's weights."""
    network: torch.nn.Module = ConfigParser(json.loads(package.read_file(INFERENCE))).get_parsed_content("network_def")
    weights = torch.load(io.BytesIO(package.read_file(CHECKPOINT)), weights_only=True)
    network.load_state_dict(weights["model"])
    return network.eval()


def test_a_unet_segmenter_is_a_dynunet_of_monai(native: Package, deeper: Path) -> None:
    network, image = built(native), torch.randn(2, 1, 16, 24, 16)
    assert type(network).__module__.startswith("monai.")
    with torch.no_grad():
        torch.testing.assert_close(network(image), load_model(deeper)[0](image))


@pytest.mark.parametrize("kind", ["segmenter", "classifier", "encoder"])
def test_the_checkpoint_holds_nothing_but_tensors_and_fits_the_network(packages: dict[str, Package], kind: str) -> None:
    package = packages[kind]
    weights = torch.load(io.BytesIO(package.read_file(CHECKPOINT)), weights_only=True)
    assert weights.keys() == {"model"}
    assert all(isinstance(value, torch.Tensor) for value in weights["model"].values())
    sides = [16 if isinstance(side, str) else side for side in package.contract.signature.inputs[0].shape[2:]]
    image = np.random.default_rng(0).standard_normal((2, 1, *sides)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(built(package)(torch.from_numpy(image)).numpy(), package.run(image), atol=1e-4)


def test_the_configuration_holds_two_expressions_and_no_class_of_medim_where_monai_has_its_own(native: Package) -> None:
    found = list(texts(json.loads(native.read_file(INFERENCE))))
    expressions = [text for text in found if text.startswith("$")]
    assert expressions == ["$[{'image': path} for path in sorted(@paths)]", "$@evaluator.run()"]
    assert not [text for text in found if "medim" in text]


@pytest.mark.parametrize("section", [{"name": "$__import__('os').system('true')"}, {"name": "unet", "norm": ["@x"]}])
def test_a_spec_that_monai_would_run_is_refused(packages: dict[str, Package], section: dict[str, Any]) -> None:
    contract = packages["classifier"].contract
    planted = contract.model_copy(update={"architecture": {**contract.architecture, "encoder": section}})
    run = SimpleNamespace(graphs=[SimpleNamespace(network=None, module=None)], weights=Path("run/model.safetensors"))
    with pytest.raises(UserError, match="MONAI would execute"):
        build_inference_config(SimpleNamespace(contract=planted, run=run))  # type: ignore[arg-type]


def test_sides_that_vary_are_multiples_that_the_network_takes(packages: dict[str, Package]) -> None:
    shape = json.loads(packages["segmenter"].read_file(METADATA))["network_data_format"]["inputs"]["image"][
        "spatial_shape"
    ]
    assert all(side.endswith("*n") for side in shape)
    packages["segmenter"].run(np.zeros((1, 1, *(int(side[:-2]) for side in shape)), np.float32))


def test_preprocessing_is_that_of_monai(packages: dict[str, Package], monkeypatch: pytest.MonkeyPatch) -> None:
    contract = packages["segmenter"].contract
    volume = make_phantom((16, 24, 16), STEPS_3D, 1, seed=1)
    assert check_monai_preprocessing(volume, contract)["verdict"] == "pass"
    monkeypatch.setitem(monai_native._CONVERTERS, "normalise", lambda **_: [])
    assert check_monai_preprocessing(volume, contract)["verdict"] == "fail"
    monkeypatch.setitem(monai_native._CONVERTERS, "resample", lambda **_: [])
    assert check_monai_preprocessing(volume, contract)["verdict"] == "fail"
    unknown = contract.model_copy(update={"preprocess": ({"op": "crop_foreground"},)})
    assert check_monai_preprocessing(volume, unknown)["verdict"] == "not run"


@pytest.mark.parametrize("step", [{"op": "resample", "spacing": [1, 1, 1], "order": 3}, {"op": "centre", "shape": [8]}])
def test_a_step_without_a_counterpart_is_said_to_have_none(step: dict[str, Any]) -> None:
    assert to_monai_transforms([{"op": "ras"}, step]) is None


def run_bundle(package: Package, how: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`python -m monai.bundle` in a package's folder, without a network where that is allowed."""
    files = ["--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json"]
    command = [*(network_isolation_command() or ()), sys.executable, "-c", how, *words, *files]
    return subprocess.run(command, cwd=package.folder, capture_output=True, text=True, check=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "segmenter", "classifier", "encoder"])
def test_monai_runs_the_bundle_without_a_network_and_answers_as_we_do(
    packages: dict[str, Package], native: Package, tmp_path: Path, kind: str
) -> None:
    package = native if kind == "native" else packages[kind]
    how = ALONE if kind == "native" else WITH_MEDIM
    assert "verified" in run_bundle(package, how, "verify_net_in_out", "--net_id", "network_def").stdout
    volume = GoldenInput.parse(package.read_file(GOLDEN)).volume
    (tmp_path / "images").mkdir()
    if kind == "native":  # straight, and larger than a window: docs/concepts/package.md says what MONAI does to others
        array = make_phantom((26, 30, 24), STEPS_3D, 1).array
        straight = np.diag([0.9, 1.0, 1.2, 1.0])
        volume = Volume(array, straight, straight, array.shape[1:])
    if volume.spatial_dims == 3:
        nibabel.save(nibabel.Nifti1Image(volume.array[0], volume.affine), tmp_path / "images" / "a.nii.gz")
    else:
        np.save(tmp_path / "images" / "a.npy", volume.array[0])
    places = ["--images", f"{tmp_path}/images/*", "--output_dir", str(tmp_path / "out")]
    run_bundle(package, how, "run", "--logging_file", "configs/logging.conf", *places)
    (answer,) = (tmp_path / "out").rglob("*.*")
    if volume.spatial_dims == 3:
        found = nibabel.load(answer)
        assert found.get_data_dtype() == np.uint8
        np.testing.assert_allclose(found.affine, volume.affine, atol=1e-5)
        assert (found.get_fdata() != package(volume)).mean() < 1e-3
    else:
        values = [float(value) for value in answer.read_text().strip().split(",")[1:]]
        np.testing.assert_allclose(values, package(volume), atol=1e-5)


def test_the_bundle_writes_the_values_of_the_mask_files() -> None:
    (section,) = _build_value_mapping((1, 2035))
    transform: Any = ConfigParser({"mapping": section}).get_parsed_content("mapping")
    mapped = transform({"pred": torch.tensor([[[0.0, 1.0, 2.0, 1.0]]])})["pred"]
    assert mapped.tolist() == [[[0, 1, 2035, 1]]]
    assert _build_value_mapping((1, 2)) == _build_value_mapping(()) == []
