"""The mutual-information map of a package: torch's own numbers, on the image's own grid, without torch."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nibabel
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import medim
from medim.cli import app
from medim.config import build_from_section
from medim.data.preprocessing.steps import preprocess
from medim.evaluation.evaluate import open_encoder
from medim.export import onnx as onnx_export
from medim.export.export import export
from medim.files import read_json
from medim.inference.network import Predictor, compute_score_map
from medim.models.critics import CRITICS
from medim.models.model import as_numpy_function, build_encoder
from medim.objectives import OBJECTIVES
from medim.objectives.objective import encoder_info
from medim.objectives.score_map import MutualInformationMap, load_score_map
from medim.package.package import Package, PackageError, load_onnx_session, load_package, verify_package, write_sums
from medim.predict.embed import embed_images
from medim.types import Array, UserError, Volume
from tests.export.packages import OBJECTIVE, SPECS, STEPS_3D, make_run, make_run_with_critic
from tests.predict.test_predict import oblique
from tests.specs import make_spec

GRAPH = "models/score_map.onnx"
STEPS = ({"op": "orthogonalise_affine"}, {"op": "ras"}, {"op": "crop_foreground"})
COPY = Predictor(
    run=lambda image: image[:, 0, 0, 0],
    kind="encoder",
    modality="mri",
    spatial_dims=3,
    in_channels=1,
    classes=(),
    preprocessing=STEPS,
    inference={"mode": "whole"},
    score_map=lambda x: 2 * x,
)


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return make_run_with_critic(place / "runs" / "with-critic")


@pytest.fixture(scope="module")
def package(run: Path, place: Path) -> Package:
    return export(run, place / "packages-with-map" / "encoder")


@pytest.fixture
def copied(package: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.folder, tmp_path / "package"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of 37 x 51 whose right half has a texture of its own."""
    array = np.random.default_rng(0).integers(0, 120, (37, 51)).astype(np.uint8)
    array[:, 25::2] += 100
    Image.fromarray(array).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def volume_of(picture: Path) -> Volume:
    return medim.read_volume(picture)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def broken(graph: bytes) -> bytes:
    """A graph with one weight changed."""
    model = onnx.load_model_from_string(graph)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    changed = onnx.numpy_helper.to_array(weights).copy()
    changed.flat[0] += 0.5
    weights.CopyFrom(onnx.numpy_helper.from_array(changed.astype(np.float32), weights.name))
    return bytes(model.SerializeToString())


def test_the_map_of_a_package_is_what_torch_computes_for_the_run(package: Package, run: Path, picture: Path) -> None:
    volume = volume_of(picture)
    scores = package.network.predict_score_map(volume)
    assert scores.shape == volume.shape
    assert scores.std() > 0.01
    np.testing.assert_allclose(scores, open_encoder(run).predict_score_map(volume), atol=1e-4)
    network = load_score_map(run)
    assert network is not None
    image = torch.from_numpy(preprocess(volume, [{"op": "normalise"}]).array)[None]
    with torch.no_grad():  # the formula, without the module that draws maps
        features = network.encoder(image)
        kept = network.objective._standardise
        summary = (features.summary - kept.running_mean) / (kept.running_var + kept.eps).sqrt()
        local, side = network.objective.critic.local, network.objective.critic.summary
        found = local(features.maps[1].flatten(2)).transpose(1, 2) @ side(summary[..., None])
    coarse = found.reshape(features.maps[1].shape[2:]).numpy()
    np.testing.assert_allclose(scores[::2, ::2], coarse, atol=1e-4)  # cells lie on every other voxel
    np.testing.assert_allclose(scores[1::2, ::2], (coarse[:-1] + coarse[1:]) / 2, atol=1e-4)


@pytest.mark.parametrize(
    "critic", [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(CRITICS)]
)
def test_the_map_of_every_critic_becomes_a_graph_for_any_batch_and_size(critic: str) -> None:
    torch.manual_seed(0)
    spec = {"in_channels": 1, **SPECS["encoder"]}
    encoder: Any = build_encoder(make_spec(spec))
    given = encoder_info(encoder, None, in_channels=1, spatial_dims=2, input_shape=(32, 32))
    objective = build_from_section(OBJECTIVES, {"name": "local_dim", "critic": {"name": critic}}, **given)
    network = MutualInformationMap(encoder, objective, {}).eval()
    sizes = onnx_export.probe_input_sizes(network, (32, 32), encoder.strides, 1)
    signature = onnx_export.build_score_signature(onnx_export.build_signature(network, sizes, 1, encoder.strides))
    graph = load_onnx_session(onnx_export.to_onnx(network, sizes, signature), signature)
    for shape in ((1, 1, 7, 9), (3, 1, 12, 5)):
        image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        want = as_numpy_function(network)(image)
        np.testing.assert_allclose(graph(image), want, atol=1e-5 * max(1, np.abs(want).max()))


def test_the_map_is_a_graph_of_its_own_with_gates_and_a_golden_input(package: Package) -> None:
    assert {GRAPH, "parity/score_map.safetensors"} <= package.sums.keys()
    contract = package.contract.score_map
    assert contract is not None
    assert contract.critic["objective"] == OBJECTIVE
    assert contract.signature.outputs[0].shape == ("batch", 1, "H", "W")
    gates = read_json(package.folder / "parity" / "report.json")["gates"]
    assert len([name for name in gates if name.startswith("score map: ")]) == 4
    assert {gate["verdict"] for name, gate in gates.items() if name.startswith("score map: ")} == {"pass"}
    names = [check.name for check in verify_package(package.folder)]
    assert names == [
        "signature",
        "files",
        "contract",
        "card",
        "network",
        "golden",
        "score map",
    ]


def test_another_map_with_recomputed_sums_is_found_by_its_golden_input(copied: Path) -> None:
    (copied / GRAPH).write_bytes(broken((copied / GRAPH).read_bytes()))
    write_sums(copied)
    with pytest.raises(PackageError, match="golden"):
        verify_package(copied)


def test_a_map_that_the_contract_names_and_that_is_not_there_is_told(copied: Path) -> None:
    (copied / GRAPH).unlink()
    write_sums(copied)
    with pytest.raises(PackageError, match=r"score_map\.onnx"):
        load_package(copied)


def test_a_map_that_is_not_torchs_stops_the_export(
    package: Package, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = iter([package.read_file("models/model.onnx"), broken(package.read_file(GRAPH))])
    monkeypatch.setattr(onnx_export, "to_onnx", lambda *_: next(graphs))
    with pytest.raises(UserError, match="score map: P2 ONNX Runtime against torch"):
        export(run, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("origin", ["package", "run"])
def test_embed_writes_a_picture_a_map_of_its_size_and_the_scale_of_its_greys(
    package: Package, run: Path, picture: Path, tmp_path: Path, origin: str
) -> None:
    place = {"package": package.folder, "run": run}[origin]
    command = [
        "embed",
        str(place),
        str(picture),
        "--out",
        str(tmp_path / "f.csv"),
        "--mi-map-dir",
        str(tmp_path / "maps"),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    (row,) = rows_of(tmp_path / "maps" / "maps.csv")
    assert list(row) == ["image", "file", "mean", "lowest", "highest"]
    assert row["image"] == rows_of(tmp_path / "f.csv")[0]["image"]
    greys = np.asarray(Image.open(tmp_path / "maps" / row["file"]))
    assert (greys.dtype, greys.shape, greys.min(), greys.max()) == (np.uint16, (37, 51), 1, 65535)
    lowest, highest = float(row["lowest"]), float(row["highest"])
    scores = lowest + (greys.astype(np.float64) - 1) / 65534 * (highest - lowest)
    np.testing.assert_allclose(scores, package.network.predict_score_map(volume_of(picture)), atol=2e-4)
    assert float(row["mean"]) == pytest.approx(scores.mean(), abs=2e-4)
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "--overwrite" in again.output
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0


@pytest.mark.parametrize("turn", ["RAS", "LPS", "SAR", "PIL"])
def test_a_map_lies_on_the_voxels_of_its_file_and_what_was_cut_away_has_no_score(tmp_path: Path, turn: str) -> None:
    image = np.zeros((14, 11, 9), np.float32)
    image[2:10, 3:9, 1:8] = np.random.default_rng(0).uniform(1, 2, (8, 6, 7))
    nibabel.save(nibabel.Nifti1Image(image, oblique(turn)), tmp_path / "scan.nii.gz")  # type: ignore[no-untyped-call, attr-defined]
    embed_images(COPY, tmp_path / "scan.nii.gz", tmp_path / "f.npz", maps=tmp_path / "maps")
    (row,) = rows_of(tmp_path / "maps" / "maps.csv")
    written = nibabel.load(tmp_path / "maps" / row["file"])  # type: ignore[attr-defined]
    assert written.get_data_dtype() == np.float32
    np.testing.assert_allclose(written.affine, oblique(turn), atol=1e-5)
    want = np.where(image > 0, 2 * image, np.nan)
    np.testing.assert_allclose(np.asarray(written.dataobj), want, rtol=1e-5)
    assert float(row["mean"]) == pytest.approx(np.nanmean(want), rel=1e-5)


def test_a_stopped_embedding_writes_maps_that_are_missing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = np.random.default_rng(0).uniform(1, 2, (8, 6, 7))
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "scan.nii.gz")  # type: ignore[no-untyped-call, attr-defined]
    command = partial(embed_images, COPY, tmp_path / "scan.nii.gz", tmp_path / "f.csv", maps=tmp_path / "maps")
    with monkeypatch.context() as context:
        context.setattr("medim.predict.embed.write_csv", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command()
    (file,) = (tmp_path / "maps").rglob("*.nii.gz")
    file.unlink()
    command(resume=True)
    assert [path.name for path in (tmp_path / "maps").glob("*.nii.gz")] == [file.name]


def test_a_resampled_map_comes_back_to_the_image_by_linear_interpolation(tmp_path: Path) -> None:
    place = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 18, 12)), indexing="ij"))
    ramp = (place * np.array([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)).sum(0).astype(np.float32)
    volume = Volume(ramp[None], oblique("RAS"), oblique("RAS"), ramp.shape)
    network = replace(COPY, preprocessing=tuple(STEPS_3D[:3]))  # 1 x 1 x 1.5 mm
    scores = network.predict_score_map(volume)
    inner = (slice(2, -2),) * 3
    np.testing.assert_allclose(scores[inner], 2 * ramp[inner], atol=1e-3)
    assert np.isfinite(scores).all()


def test_a_padded_image_has_a_map_of_its_own_size() -> None:
    def scores(image: Array) -> Array:
        assert image.shape[2:] == (16, 16)
        return image * 3

    volume = Volume(np.ones((1, 13, 9), np.float32), np.eye(4), np.eye(4), (13, 9))
    found = compute_score_map(scores, volume, (), {"mode": "whole", "multiple_of": 16})
    np.testing.assert_array_equal(found, np.full((13, 9), 3))


def test_an_encoder_without_a_critic_is_told_what_to_do(picture: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "encoder")
    command = ["embed", str(run), str(picture), "--out", str(tmp_path / "f.csv")]
    result = CliRunner().invoke(app, [*command, "--mi-map-dir", str(tmp_path / "maps")])
    assert result.exit_code == 1
    assert "Pretrain with the objective local_dim" in " ".join(result.output.split())
    assert not (tmp_path / "maps").exists()
    assert not (tmp_path / "f.csv").exists()


LIGHT = """
import sys
for missing in ("torch", "monai", "pandas", "pyarrow", "SimpleITK", "onnx", "sklearn"):
    sys.modules[missing] = None
from pathlib import Path
from medim import load_package
from medim.package.package import verify_package
from medim.predict.embed import embed_images
package, picture, out = map(Path, sys.argv[1:])
assert [check.verdict for check in verify_package(package)] == ["not run", *["pass"] * 6]
embed_images(load_package(package), picture, out / "features.csv", maps=out / "maps")
print(sorted(path.suffix for path in (out / "maps").glob("*.*") if path.suffix))
"""


def test_maps_are_drawn_where_neither_torch_nor_the_rest_of_the_train_extra_is_installed(
    package: Package, picture: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", LIGHT, *map(str, [package.folder, picture, tmp_path])]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(medim.__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "['.csv', '.png']"


def test_no_file_of_a_package_with_a_map_holds_a_path_or_a_name(package: Package, secrets: list[bytes]) -> None:
    for path in (p for p in package.folder.rglob("*") if p.is_file()):
        assert [secret for secret in secrets if secret in path.read_bytes()] == [], path.name
