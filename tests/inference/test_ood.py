"""A package tells images that are not like those it was trained on."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

import medim
from medim.cli import app
from medim.data.index.index import build_index
from medim.data.preprocessing.quality import measure_quality
from medim.data.preprocessing.steps import preprocess
from medim.export.export import export
from medim.files import read_json, write_bytes
from medim.inference.network import run_inference
from medim.inference.ood import OOD_FILE, FeatureRecorder, GaussianModel, describe_difference, ood_features
from medim.models.ood_features import as_numpy_predictor
from medim.models.serialization import load_encoder, load_model
from medim.package.package import Package, PackageError, load_package, verify_package, write_sums
from medim.predict.embed import embed_images
from medim.predict.predict import predict
from medim.training.fit_ood import fit_detector
from medim.types import Array, UserError, Volume
from tests.export.packages import SPECS, make_run

USUAL = ("a.png", "b.png", "c.png")


def picture(seed: int, side: int = 32) -> Array:
    """A bright disc that is never quite the same, on a dark ground."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    disc = (x - rng.normal(0, 0.03)) ** 2 + (y - rng.normal(0, 0.03)) ** 2 < rng.normal(0.08, 0.008)
    grey = 40 + rng.normal(0, 3) + 120 * disc * (1 - 0.5 * y * rng.normal(1, 0.2)) + rng.normal(0, 6, (side, side))
    return np.asarray(np.clip(grey, 0, 255), np.uint8)


def write_run_with_detector(folder: Path, kind: str) -> Path:
    """A run with random weights, and statistics of pictures as training would leave them."""
    run = make_run(folder, kind)
    spec = SPECS[kind]
    both = as_numpy_predictor(load_encoder(run) if kind == "encoder" else load_model(run)[0])
    rows = []
    for seed in range(90):
        volume = Volume(picture(seed)[None].astype(np.float32), np.eye(4), np.eye(4), (32, 32))
        watch, processed = FeatureRecorder(both), preprocess(volume, spec["preprocessing"])
        run_inference(watch, processed, spec["inference"])
        rows.append(ood_features(measure_quality(volume), processed, watch.features))
    subjects = [f"s-{seed}" for seed in range(90)]
    reference = fit_detector(rows[:60], subjects[:60], rows[60:], subjects[60:])
    write_bytes(run / ("encoder" if kind == "encoder" else "model") / OOD_FILE, reference.dump())
    return run


@pytest.fixture(scope="module")
def detector_packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Package]:
    folder = tmp_path_factory.mktemp("detector")
    return {
        kind: export(write_run_with_detector(folder / "runs" / kind, kind), folder / kind)
        for kind in ("classifier", "encoder")
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    images = {name: picture(1000 + seed) for seed, name in enumerate(USUAL)}
    images["inverted.png"] = 255 - picture(2000)
    images["noise.png"] = np.random.default_rng(0).integers(0, 255, (32, 32)).astype(np.uint8)
    images["large.png"] = np.kron(picture(2001), np.ones((4, 4), np.uint8))
    for name, image in images.items():
        Image.fromarray(image).save(folder / name)
    return folder


def rows_in(file: Path) -> dict[str, dict[str, str]]:
    with file.open(newline="") as text:
        return {row["image"]: row for row in csv.DictReader(text)}


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_inverted_noise_and_another_size_are_flagged_and_the_usual_is_not(
    detector_packages: dict[str, Package], pictures: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "encoder":
        embed_images(detector_packages[kind], pictures, tmp_path / "f.csv")
        rows = rows_in(tmp_path / "f.csv")
    else:
        predict(detector_packages[kind], pictures, tmp_path)
        rows = rows_in(tmp_path / "predictions.csv")
    assert {name for name, row in rows.items() if row["ood"] == "True"} == {"inverted", "noise", "large"}
    assert all((float(row["ood_score"]) > 1) == (row["ood"] == "True") for row in rows.values())
    assert rows["large"]["ood_feature_group"] == "geometry"
    if kind == "classifier":
        assert rows["large"]["ood_reason"].startswith(("smaller", "larger", "extent"))
        assert "4 times that of the training images" in rows["large"]["ood_reason"]
        assert {rows[name.removesuffix(".png")]["ood_reason"] for name in USUAL} == {""}


def test_every_format_and_the_answer_to_one_image_say_the_same(
    detector_packages: dict[str, Package], pictures: Path, tmp_path: Path
) -> None:
    embed_images(detector_packages["encoder"], pictures, tmp_path / "f.csv")
    embed_images(detector_packages["encoder"], pictures, tmp_path / "f.npz")
    embed_images(detector_packages["encoder"], pictures, tmp_path / "f.parquet")
    want = rows_in(tmp_path / "f.csv")
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pylist()
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert [str(bool(flag)) for flag in file["ood"]] == [row["ood"] for row in want.values()]
        np.testing.assert_allclose(file["ood_score"], [float(row["ood_score"]) for row in want.values()], rtol=1e-5)
        assert (
            file["ood_feature_group"].tolist()
            == [row["ood_feature_group"] for row in table]
            == [r["ood_feature_group"] for r in want.values()]
        )
    assert [str(row["ood"]) for row in table] == [row["ood"] for row in want.values()]
    rows = predict(detector_packages["classifier"], pictures, tmp_path / "out")
    for row in rows:
        content = read_json(tmp_path / "out" / row["file"])
        assert {key: content[key] for key in ("ood_score", "ood", "ood_feature_group")} == {
            key: row[key] for key in ("ood_score", "ood", "ood_feature_group")
        }


def test_onnx_runtime_scores_as_torch_does(
    detector_packages: dict[str, Package], pictures: Path, tmp_path: Path
) -> None:
    package = detector_packages["encoder"]
    torch = replace(package.network, predict_with_features=as_numpy_predictor(load_encoder(package.folder)))
    index = build_index(pictures, "xray")
    for record in index.records:
        ours, theirs = (network.predict_with_ood(index.open(record))[1] for network in (package.network, torch))
        assert ours.score == pytest.approx(theirs.score, rel=1e-3)


def test_answers_of_unusual_images_are_withheld_on_request(
    detector_packages: dict[str, Package], packages: dict[str, Package], pictures: Path, tmp_path: Path
) -> None:
    package = detector_packages["classifier"]
    rows = predict(package, pictures, tmp_path / "out", withhold_unusual=True, preview=True)
    assert [row["image"] for row in rows] == ["a", "b", "c"]
    rejections = list(csv.DictReader((tmp_path / "out" / "rejected.csv").read_text().splitlines()))
    assert [(row["path"], row["reason"]) for row in rejections] == [
        (name, "unusual") for name in ("inverted.png", "large.png", "noise.png")
    ]
    assert "times the limit" in rejections[0]["detail"]
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.suffix in {".json", ".png"}}
    assert written == {"a.json", "b.json", "c.json", "a.png", "b.png", "c.png", "summary.json"}
    with pytest.raises(UserError, match="no out-of-distribution detector"):
        predict(packages["classifier"], pictures, tmp_path / "other", withhold_unusual=True)
    assert not (tmp_path / "other").exists()


def test_the_command_counts_the_answers_and_warns_of_unusual_images(
    detector_packages: dict[str, Package], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pictures, "scans")
    Path("scans/empty.png").touch()
    words = ["predict", str(detector_packages["classifier"].folder), "scans", "--out"]
    ran = CliRunner().invoke(app, [*words, "out"], catch_exceptions=False)
    assert ran.exit_code == 0
    output = " ".join(ran.stdout.split())
    assert "predicted 6 UNUSUAL 3 (geometry 1, intensities 2) rejected 1 (empty-file 1)" in output
    assert "predictions image file class" in output
    warnings = [line for line in ran.stderr.splitlines() if line.startswith("WARNING")]
    assert [line.split(":")[0] for line in warnings] == [
        f"WARNING unusual image {name}" for name in ("inverted", "large", "noise")
    ]
    for number in range(10):
        shutil.copy("scans/noise.png", f"scans/n{number}.png")
        with Path(f"scans/n{number}.png").open("ab") as file:
            file.write(b" ")
    ran = CliRunner().invoke(app, [*words, "many", "--quiet", "--preview"], catch_exceptions=False)
    assert "predictions image file class" not in " ".join(ran.stdout.split())
    assert "many/previews" in ran.stdout


@pytest.mark.parametrize(
    ("group", "row", "text"),
    [
        ("geometry", [3.0, 0, 0, 0, 0, 0, 0, 0, 0], "smallest voxel size 20.1 times that of the training images"),
        ("geometry", [0, 0, 0, 0, 0, -3.0, 0, 0, 0], "largest side of the field of view 0.0498 times"),
        ("geometry", [0, 0, 0, 0, 3.0, 0], "extent of the preprocessed image along axis 1 20.1 times"),
        ("geometry", [1.0] * 9, "unusual combination of voxel size and field of view"),
        ("geometry", [np.nan] * 9, "geometry beyond the range of numbers"),
        ("intensities", [0, 0, 0, 5.0, *[0] * 8], "fraction of background voxels 500 %, in the training images 0 %"),
        ("intensities", [-4.0, *[0] * 11], "lowest intensity lower than in the training images"),
        ("intensities", [*[0] * 11, 4.0], "percentile 99 of the preprocessed intensities higher than"),
        ("features", [9.0, 0], "features of the encoder unlike those of the training images"),
    ],
)
def test_the_reason_names_the_value_that_differs_most(group: str, row: list[float], text: str) -> None:
    d = len(row)
    gaussian = GaussianModel(np.zeros(d), np.ones(d), np.eye(d), 1.0)
    assert describe_difference(group, np.array(row), gaussian).startswith(text)


LIGHT = """
import sys
for missing in ("torch", "monai", "pandas", "pyarrow", "SimpleITK", "onnx", "sklearn"):
    sys.modules[missing] = None
from pathlib import Path
from medim import load_package
from medim.predict.predict import predict
package, pictures, out = map(Path, sys.argv[1:])
print(sorted(row["image"] for row in predict(load_package(package), pictures, out) if row["ood"]))
"""


def test_the_flag_needs_no_torch(detector_packages: dict[str, Package], pictures: Path, tmp_path: Path) -> None:
    places = [detector_packages["classifier"].folder, pictures, tmp_path / "out"]
    command = [sys.executable, "-c", LIGHT, *map(str, places)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(medim.__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "['inverted', 'large', 'noise']"


def test_a_package_without_statistics_leaves_the_cells_empty(
    packages: dict[str, Package], pictures: Path, tmp_path: Path
) -> None:
    assert packages["classifier"].contract.reference is None
    rows = predict(packages["classifier"], pictures, tmp_path / "out")
    assert {(row["ood_score"], row["ood"], row["ood_feature_group"]) for row in rows} == {(None, None, None)}
    assert {row["ood"] for row in rows_in(tmp_path / "out" / "predictions.csv").values()} == {""}
    embed_images(packages["encoder"], pictures, tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert np.isnan(file["ood_score"]).all()
        assert set(file["ood"].tolist()) == {-1}
    embed_images(packages["encoder"], pictures, tmp_path / "f.parquet")
    assert set(pyarrow.parquet.read_table(tmp_path / "f.parquet")["ood"].to_pylist()) == {None}


def test_contract_card_and_verify_tell_of_the_statistics(detector_packages: dict[str, Package]) -> None:
    package = detector_packages["encoder"]
    assert package.contract.reference is not None
    assert (package.contract.reference.images, package.contract.reference.held_out_subjects) == (60, 30)
    checks = {check.name: check for check in verify_package(package.folder)}
    detail = checks["out-of-distribution detector"].detail
    assert "60 images of 60 subjects; limits from 30 images of 30 other subjects" in detail
    assert "60 images of 60 subjects" in (package.folder / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("damage", ["removed", "garbage"])
def test_statistics_that_are_gone_or_damaged_are_no_package(
    detector_packages: dict[str, Package], tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(detector_packages["encoder"].folder, tmp_path / "package"))
    file = folder / "models" / OOD_FILE
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(b"PK\x03\x04 no archive")
    write_sums(folder)
    with pytest.raises(PackageError, match=r"reference\.safetensors"):
        load_package(folder).network  # noqa: B018
