from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow.parquet
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

import medim
from medim.data.index.index import AllRejectedError
from medim.data.readers import base
from medim.files import read_json
from medim.inference.network import Predictor
from medim.package.package import Package
from medim.predict.embed import embed_images
from medim.predict.predict import predict
from medim.types import Array, UsageError, UserError, Volume
from tests.data.readers.test_bombs import BOMBS, sparse_nifti


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _bright(image: Array) -> Array:
    return np.concatenate([0.5 - image, image - 0.5], axis=1)


RANGE = ({"op": "orthogonalise_affine"}, {"op": "ras"}, {"op": "normalise", "method": "range"})
BRIGHT = Predictor(
    run=_bright,
    kind="segmenter",
    modality="mri",
    spatial_dims=3,
    in_channels=1,
    classes=("bright",),
    preprocessing=RANGE,
    inference={"mode": "whole", "multiple_of": 4},
)


def oblique(turn: str) -> Array:
    """An affine whose axes run as `turn` says (as LPS, IRA), all tilted."""
    a, b = 0.3, -0.2
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]]) @ np.array(
        [[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]]
    )
    axes = nibabel.orientations.axcodes2ornt(tuple(turn))
    affine = np.eye(4)
    for column, (axis, sign) in enumerate(axes):
        affine[:3, column] = tilt[:, int(axis)] * sign * (0.8, 1.1, 2.5)[column]
    affine[:3, 3] = [12.0, -30.0, 7.5]
    return affine


@pytest.mark.parametrize("turn", ["RAS", "LAS", "RPS", "RAI", "LPS", "LAI", "RPI", "LPI", "SAR", "PIL", "ASL"])
def test_a_mask_lies_on_the_voxels_of_its_file_however_the_axes_run(tmp_path: Path, turn: str) -> None:
    image = np.zeros((14, 11, 9), np.float32)
    image[2:6, 3:5, 1:3] = 100  # nearer to one corner, so that any flip moves it
    image[9, 8, 7] = 90
    source = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image, oblique(turn)), source)  # type: ignore[no-untyped-call, attr-defined]

    rows = predict(BRIGHT, source, tmp_path / "out")

    have, want = sitk.ReadImage(str(tmp_path / "out" / rows[0]["file"])), sitk.ReadImage(str(source))
    assert have.GetSize() == want.GetSize()
    for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(have, geometry)(), getattr(want, geometry)(), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(have), sitk.GetArrayFromImage(want) > 50)
    header: Any = nibabel.load(tmp_path / "out" / rows[0]["file"])  # type: ignore[attr-defined]
    assert (int(header.header["qform_code"]), int(header.header["sform_code"])) == (1, 1)
    np.testing.assert_allclose(rows[0]["ml_bright"], 17 * 0.8 * 1.1 * 2.5 / 1000, rtol=1e-4)


def test_a_dicom_series_and_a_nifti_file_are_segmented_in_one_call(
    packages: dict[str, Package], shared_data: Path, tmp_path: Path
) -> None:
    series = [shared_data / "mri-dicom" / study for study in ("Study1/13_HCropVolume", "Study2/14_HCropVolume")]
    crop = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    rows = predict(packages["segmenter"], [*series, crop], tmp_path / "out")
    assert len(rows) == 3
    wanted = [_series(folder) for folder in series] + [sitk.ReadImage(str(crop))]
    for row, want in zip(rows, wanted, strict=True):
        have = sitk.ReadImage(str(tmp_path / "out" / row["file"]))
        assert have.GetSize() == want.GetSize()
        for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(have, geometry)(), getattr(want, geometry)(), atol=1e-4)
        labels, voxel = sitk.GetArrayFromImage(have), float(np.prod(want.GetSpacing()))
        for label, name in enumerate(("anterior", "posterior"), start=1):
            np.testing.assert_allclose(row[f"ml_{name}"], (labels == label).sum() * voxel / 1000, atol=1e-5)
    written = rows_of(tmp_path / "out" / "predictions.csv")
    assert [row["image"] for row in written] == [row["image"] for row in rows]
    ood_columns = ["ood_score", "ood", "ood_feature_group", "ood_reason"]
    assert list(written[0]) == ["image", "file", "ml_anterior", "ml_posterior", *ood_columns]
    summary = read_json(tmp_path / "out" / "summary.json")
    assert summary["counts"] == {"images": 3, "predicted": 3, "unusual": 0, "rejected": 0}
    assert summary["package"]["sha256"] == packages["segmenter"].sha256


def _series(folder: Path) -> Any:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def test_bright_voxels_of_an_oblique_dicom_series_are_found_where_simpleitk_sees_them(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = next((shared_data / "mri-dicom" / "Study1").glob("*FLAIR*"))
    rows = predict(BRIGHT, folder, tmp_path / "out")
    have, want = sitk.ReadImage(str(tmp_path / "out" / rows[0]["file"])), _series(folder)
    assert have.GetSize() == want.GetSize()
    for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(have, geometry)(), getattr(want, geometry)(), atol=1e-3)
    voxels = sitk.GetArrayFromImage(want).astype(np.float64)
    middle = (voxels.min() + voxels.max()) / 2
    differs = (sitk.GetArrayFromImage(have) > 0) != (voxels > middle)
    assert not differs[np.abs(voxels - middle) > 1e-3 * middle].any()


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (40, 30)).astype(np.uint8)).save(folder / f"{name}.png")
    np.savez(folder / "set.npz", val_images=rng.integers(0, 255, (3, 28, 28), dtype=np.uint8), val_labels=np.zeros(3))
    return folder


def test_pictures_and_arrays_are_classified_with_their_probabilities(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    rows = predict(packages["classifier"], _pictures(tmp_path / "in"), tmp_path / "out")
    assert len(rows) == 5
    for row in rows:
        content = read_json(tmp_path / "out" / row["file"])
        assert content["schema_version"] == 2
        assert content["image"] == row["image"]
        assert content["class"] == row["class"] == max(content["probabilities"], key=content["probabilities"].get)
        np.testing.assert_allclose(sum(content["probabilities"].values()), 1, atol=1e-5)
        assert row["probability_pneumonia"] == content["probabilities"]["pneumonia"]
    assert list(rows_of(tmp_path / "out" / "predictions.csv")[0])[:3] == ["image", "file", "class"]


def test_a_mask_of_a_picture_is_a_picture_of_its_size(tmp_path: Path) -> None:
    network = Predictor(
        run=_bright,
        kind="segmenter",
        modality="xray",
        spatial_dims=2,
        in_channels=1,
        classes=("bright",),
        preprocessing=RANGE[2:],
        inference={"mode": "whole", "multiple_of": 8},
    )
    rows = predict(network, _pictures(tmp_path / "in") / "a.png", tmp_path / "out")
    mask, source = (np.asarray(Image.open(p)) for p in (tmp_path / "out" / rows[0]["file"], tmp_path / "in" / "a.png"))
    np.testing.assert_array_equal(mask, (source > (int(source.min()) + int(source.max())) / 2).astype(np.uint8))
    assert rows[0]["mm2_bright"] == mask.sum()


@pytest.mark.parametrize(("value", "dtype"), [(255, np.uint8), (2035, np.uint16)])
def test_a_mask_has_the_values_of_the_mask_files_of_training(tmp_path: Path, value: int, dtype: Any) -> None:
    image = np.zeros((12, 8, 8), np.float32)
    image[3:6, 2:5, 2:5] = 100
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "scan.nii.gz")  # type: ignore[no-untyped-call, attr-defined]
    row = predict(replace(BRIGHT, class_values=(value,)), tmp_path / "scan.nii.gz", tmp_path / "out")[0]
    written: Any = nibabel.load(tmp_path / "out" / str(row["file"]))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(np.asarray(written.dataobj), value * (image > 50))
    assert written.get_data_dtype() == dtype
    network = replace(BRIGHT, modality="xray", spatial_dims=2, preprocessing=RANGE[2:], class_values=(value,))
    row = predict(network, _pictures(tmp_path / "in") / "a.png", tmp_path / "pictures")[0]
    with Image.open(tmp_path / "pictures" / str(row["file"])) as picture:
        assert set(np.unique(np.asarray(picture))) == {0, value}


def test_what_cannot_be_read_is_rejected_with_a_reason_and_the_rest_is_done(shared_data: Path, tmp_path: Path) -> None:
    good = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    bad = shared_data / "bad-inputs" / "imagesTr" / "hippocampus_truncated.nii.gz"
    rows = predict(BRIGHT, [good, bad], tmp_path / "out")
    assert len(rows) == 1
    rejected = rows_of(tmp_path / "out" / "rejected.csv")
    assert [Path(row["path"]).name for row in rejected] == [bad.name]
    assert rejected[0]["reason"] == "truncated"


@pytest.mark.parametrize(("length", "reason"), [(-2, "truncated"), (300, "unreadable"), (0, "empty-file")])
def test_a_series_with_a_damaged_last_slice_gets_no_prediction(
    shared_data: Path, tmp_path: Path, length: int, reason: str
) -> None:
    series = tmp_path / "in" / "series"
    shutil.copytree(next((shared_data / "mri-dicom" / "Study1").glob("*FLAIR*")), series)
    good = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    last = max(series.iterdir(), key=lambda path: pydicom.dcmread(path).InstanceNumber)
    last.write_bytes(last.read_bytes()[:length])
    rows = predict(BRIGHT, [good, series], tmp_path / "out")
    assert len(rows) == 1
    rejected = rows_of(tmp_path / "out" / "rejected.csv")
    assert {row["reason"] for row in rejected} == {reason, "incomplete-series"}


@pytest.mark.parametrize("name", [name for name in BOMBS if name != "bomb.npz"])
def test_a_bomb_beside_good_images_costs_itself_alone(shared_data: Path, tmp_path: Path, name: str) -> None:
    good = sorted((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))[:1]
    rows = predict(BRIGHT, [*good, BOMBS[name](tmp_path / name)], tmp_path / "out")
    assert [row["image"] for row in rows] == [rows_of(tmp_path / "out" / "predictions.csv")[0]["image"]]
    assert [row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")] == ["compression-ratio"]


def test_an_image_that_needs_more_than_the_free_memory_is_not_read(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    large = sparse_nifti(tmp_path / "large.nii", (256, 256, 256))
    monkeypatch.setattr(base, "available_memory", lambda: 15 << 24)
    rows = predict(BRIGHT, [small, large], tmp_path / "out")
    assert len(rows) == 1
    assert [row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")] == ["too-much-memory"]


LIMITED_PREDICTION = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from medim.predict.predict import predict
from tests.predict.test_predict import BRIGHT

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
    predict(BRIGHT, Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_the_largest_image_in_3_gib_costs_itself_alone(shared_data: Path, tmp_path: Path) -> None:
    """An image of 2^29 voxels in a file without compression, which no ratio reveals."""
    (tmp_path / "in").mkdir()
    good = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    shutil.copy(good, tmp_path / "in")
    sparse_nifti(tmp_path / "in" / "largest.nii", (1024, 512, 1024))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # their stacks count
    command = [sys.executable, "-c", LIMITED_PREDICTION, tmp_path / "in", tmp_path / "out"]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    assert [row["image"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == [good.name.split(".")[0]]
    assert [row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")] == ["too-much-memory"]


def test_an_image_that_does_not_fit_into_memory_costs_itself_alone(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))[:2]

    def predict_with_score(network: Predictor, volume: Volume) -> Any:
        monkeypatch.undo()  # the second fits
        raise MemoryError

    monkeypatch.setattr(Predictor, "predict_with_ood", predict_with_score)
    rows = predict(BRIGHT, files, tmp_path / "out")
    assert len(rows) == 1
    assert [row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")] == ["too-much-memory"]


def test_an_image_that_the_network_does_not_take_is_rejected_and_nothing_left_is_exit_4(
    tmp_path: Path, packages: dict[str, Package]
) -> None:
    source = tmp_path / "a.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(source)
    network = Predictor(
        run=_bright,
        kind="segmenter",
        modality="xray",
        spatial_dims=3,
        in_channels=1,
        classes=("bright",),
        preprocessing=(),
        inference={"mode": "whole"},
    )
    with pytest.raises(AllRejectedError) as raised:
        predict(network, source, tmp_path / "out")
    assert raised.value.exit_code == 4
    assert [row["reason"] for row in rows_of(tmp_path / "out" / "rejected.csv")] == ["not-for-this-network"]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_an_image_with_a_non_finite_answer_is_rejected(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, seed in (("a", 0), ("b", 1)):
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 8)).astype(np.uint8)
        pixels[0, 0] = 255 * seed
        Image.fromarray(pixels).save(source / f"{name}.png")

    def run_overflowing(image: Array) -> Array:
        return np.where(image[:, :1, :1, :1] > 0, np.inf, np.concatenate([image, -image], axis=1)).astype(np.float32)

    network = replace(BRIGHT, run=run_overflowing, modality="xray", spatial_dims=2, preprocessing=())
    rows = predict(network, source, tmp_path / "out")
    assert [row["image"] for row in rows] == ["a"]
    rejected = rows_of(tmp_path / "out" / "rejected.csv")
    assert [(row["path"], row["reason"]) for row in rejected] == [("b.png", "non-finite-answer")]


def test_a_source_without_any_image_is_exit_4_and_its_reasons_are_written(
    shared_data: Path, tmp_path: Path, packages: dict[str, Package]
) -> None:
    with pytest.raises(AllRejectedError):
        predict(packages["classifier"], shared_data / "dicom-formats" / "liver.dcm", tmp_path / "out")
    assert len(rows_of(tmp_path / "out" / "rejected.csv")) == 1


def test_no_name_of_a_patient_reaches_an_output(
    shared_data: Path, packages: dict[str, Package], tmp_path: Path
) -> None:
    import pydicom

    folder = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume"
    header = pydicom.dcmread(next(folder.glob("*.dcm")), stop_before_pixels=True)
    named = tmp_path / str(header.PatientID)
    named.symlink_to(folder)
    predict(packages["segmenter"], named, tmp_path / "out")
    words = [str(header.PatientID), str(header.PatientName), *str(header.PatientName).split("^")]
    for path in (tmp_path / "out").iterdir():
        text = path.name.encode() + path.read_bytes()
        assert [word for word in words if len(word) > 3 and word.encode() in text] == []


LIGHT = """
import sys
for missing in ("torch", "monai", "pandas", "pyarrow", "SimpleITK", "onnx", "sklearn"):
    sys.modules[missing] = None
from dataclasses import replace
from pathlib import Path
from medim import load_package
from medim.package.package import verify_package
from medim.predict.embed import embed_images
from medim.predict.predict import predict
segmenter, encoder, series, picture, out = map(Path, sys.argv[1:])
assert [check.verdict for check in verify_package(segmenter)] == ["not run", *["pass"] * 5]
print(len(predict(load_package(segmenter), series, out / "masks")))
print(embed_images(load_package(encoder), picture, out / "features.csv")[1].shape)
"""


def test_verify_predict_and_embed_run_where_neither_torch_nor_the_rest_of_the_train_extra_is_installed(
    packages: dict[str, Package], shared_data: Path, tmp_path: Path
) -> None:
    series, picture = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume", _pictures(tmp_path / "in") / "a.png"
    places = [packages["segmenter"].folder, packages["encoder"].folder, series, picture, tmp_path]
    command = [sys.executable, "-c", LIGHT, *map(str, places)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(medim.__file__).parents[1])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == ["1", "(1, 8)"]


def test_file_names_are_plain_and_different(tmp_path: Path) -> None:
    source = tmp_path / "in"
    image = np.zeros((4, 5, 6), np.float32)
    image[1, 2, 3] = 1
    for name in ("a b", "a_b", "summary", "A_B", "x" * 150):
        (source / "p").mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), source / "p" / f"{name}.nii.gz")  # type: ignore[no-untyped-call, attr-defined]
    rows = predict(BRIGHT, source, tmp_path / "out")
    files = [row["file"] for row in rows]
    assert len({name.lower() for name in files}) == 5
    assert all(name.replace("_", "").replace("-", "").replace(".", "").isalnum() and len(name) < 130 for name in files)
    assert all((tmp_path / "out" / name).is_file() for name in files)


def test_the_same_input_gives_the_same_bytes(packages: dict[str, Package], shared_data: Path, tmp_path: Path) -> None:
    crop = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    for out in ("one", "two"):
        predict(packages["segmenter"], crop, tmp_path / out)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two


def test_features_are_the_same_in_every_format(packages: dict[str, Package], tmp_path: Path) -> None:
    source = _pictures(tmp_path / "in")
    images, features = embed_images(packages["encoder"], source, tmp_path / "f.npz")
    assert features.shape == (5, 8)
    assert features.std(axis=0).min() > 0
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert file["image"].tolist() == list(images)
        np.testing.assert_array_equal(file["features"], features)
        assert file["schema_version"] == 2
    embed_images(packages["encoder"], source, tmp_path / "f.csv")
    rows = rows_of(tmp_path / "f.csv")
    assert [row["image"] for row in rows] == list(images)
    np.testing.assert_array_equal(np.array([[row[f"f{i}"] for i in range(8)] for row in rows], np.float32), features)
    embed_images(packages["encoder"], source, tmp_path / "f.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "f.parquet").to_pydict()
    np.testing.assert_array_equal(np.array([table[f"f{i}"] for i in range(8)], np.float32).T, features)
    assert table["subject"] == [row["subject"] for row in rows]


def test_a_package_of_another_kind_or_a_format_not_offered_is_told(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="medim embed"):
        predict(packages["encoder"], tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="expected an encoder"):
        embed_images(packages["classifier"], tmp_path, tmp_path / "f.npz")
    with pytest.raises(UsageError, match=r"\.parquet"):
        embed_images(packages["encoder"], tmp_path, tmp_path / "f.xlsx")
    with pytest.raises(UsageError, match="nifti"):
        predict(packages["classifier"], tmp_path, tmp_path / "out", output_format="gifti")  # type: ignore[arg-type]


def test_results_of_another_run_are_kept_unless_told_otherwise(packages: dict[str, Package], tmp_path: Path) -> None:
    source = _pictures(tmp_path / "in")
    predict(packages["classifier"], source, tmp_path / "out")
    before = json.dumps(sorted(path.name for path in (tmp_path / "out").iterdir()))
    with pytest.raises(UserError, match="--overwrite"):
        predict(packages["classifier"], source, tmp_path / "out")
    predict(packages["classifier"], source, tmp_path / "out", overwrite=True)
    assert json.dumps(sorted(path.name for path in (tmp_path / "out").iterdir())) == before


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stop_after(number: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == number:
            raise KeyboardInterrupt

    return progress


def test_a_stopped_prediction_continues_and_gives_the_files_of_an_uninterrupted_one(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    source, package = _pictures(tmp_path / "in"), packages["classifier"]
    predict(package, source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        predict(package, source, tmp_path / "out", progress=stop_after(3))
    with (tmp_path / "out" / ".medim-new" / "progress.jsonl").open("a") as journal:
        journal.write('{"image": "cut by a ki')
    with pytest.raises(UserError, match="--resume"):
        predict(package, source, tmp_path / "out")
    processed = []
    predict(package, source, tmp_path / "out", resume=True, progress=lambda done, _: processed.append(done))
    assert processed == [4, 5]
    whole, resumed = read_all(tmp_path / "whole"), read_all(tmp_path / "out")
    assert {**resumed, ".medim": b""} == {**whole, ".medim": b""}
    assert predict(package, source, tmp_path / "out", resume=True, progress=stop_after(1)), "complete: nothing is done"


def test_a_finished_prediction_is_resumed_by_processing_the_images_without_files(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    source, package, out = _pictures(tmp_path / "in"), packages["classifier"], tmp_path / "out"
    predict(package, source, out, preview=True)
    whole, (first, second, *_) = read_all(out), sorted(out.glob("previews/*.png"))
    (out / f"{first.stem}.json").unlink()
    for file in (second, out / "predictions.csv"):
        file.unlink()
    processed = []
    predict(package, source, out, preview=True, resume=True, progress=lambda done, _: processed.append(done))
    assert len(processed) == 2
    journals = {"progress.jsonl": b""}  # has the lines of both calls
    assert read_all(out) | journals == whole | journals


def test_a_prediction_is_not_continued_with_other_images_or_another_package(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    source = _pictures(tmp_path / "in")
    with pytest.raises(KeyboardInterrupt):
        predict(packages["classifier"], source, tmp_path / "out", progress=stop_after(2))
    (source / "b.png").unlink()
    with pytest.raises(UserError, match=r"have changed: index_hash.*--overwrite"):
        predict(packages["classifier"], source, tmp_path / "out", resume=True)
    predict(packages["classifier"], source, tmp_path / "out", overwrite=True)
    assert len(rows_of(tmp_path / "out" / "predictions.csv")) == 4


def test_a_prediction_that_fails_changes_no_byte_of_the_earlier_one(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    source = _pictures(tmp_path / "in")
    predict(packages["classifier"], source, tmp_path / "out")
    before = read_all(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    for wrong in (tmp_path / "nosuch", tmp_path / "empty", tmp_path / "text"):
        with pytest.raises(UserError):
            predict(packages["classifier"], wrong, tmp_path / "out", overwrite=True)
        after = read_all(tmp_path / "out")
        assert {**after, ".medim": b""} == {**before, ".medim": b""}
    assert [row["path"] for row in rows_of(tmp_path / "out.rejected.csv")] == ["a.txt"]
    with pytest.raises(UserError, match="--overwrite"):
        predict(packages["classifier"], source, source, overwrite=True)
    assert len(list(source.iterdir())) == 3


def test_masks_written_inside_a_source_do_not_become_images(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    rng = np.random.default_rng(0)
    nibabel.save(nibabel.Nifti1Image(rng.uniform(0, 99, (12, 12, 8)), np.eye(4)), source / "a.nii.gz")  # type: ignore[no-untyped-call]
    for number in range(2):
        assert len(predict(BRIGHT, source, source / f"answers-{number}")) == 1


@pytest.mark.parametrize("suffix", [".npz", ".csv"])
def test_a_stopped_embedding_continues_and_gives_the_same_file(
    packages: dict[str, Package], tmp_path: Path, suffix: str
) -> None:
    source, package = _pictures(tmp_path / "in"), packages["encoder"]
    out = tmp_path / f"out{suffix}"
    embed_images(package, source, tmp_path / f"whole{suffix}")
    with pytest.raises(KeyboardInterrupt):
        embed_images(package, source, out, progress=stop_after(3))
    with pytest.raises(UserError, match="--resume"):
        embed_images(package, source, out)
    processed = []
    embed_images(package, source, out, resume=True, progress=lambda done, _: processed.append(done))
    assert processed == [4, 5]
    if suffix == ".csv":
        assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    else:
        one, two = np.load(out), np.load(tmp_path / f"whole{suffix}")
        assert all(np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f") for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", f"out{suffix}", f"whole{suffix}"]


def test_an_existing_file_is_not_replaced_by_features_and_stale_rejections_are_removed(
    packages: dict[str, Package], tmp_path: Path
) -> None:
    source = _pictures(tmp_path / "in")
    (tmp_path / "labels.csv").write_text("precious")
    (tmp_path / "labels.csv.rejected.csv").write_text("of an earlier call")
    with pytest.raises(UserError, match=r"expected a new file.*--overwrite"):
        embed_images(packages["encoder"], source, tmp_path / "labels.csv")
    assert (tmp_path / "labels.csv").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("no image")
    with pytest.raises(AllRejectedError):
        embed_images(packages["encoder"], tmp_path / "empty", tmp_path / "labels.csv", overwrite=True)
    assert (tmp_path / "labels.csv").read_text() == "precious"
    embed_images(packages["encoder"], source, tmp_path / "labels.csv", overwrite=True)
    assert not (tmp_path / "labels.csv.rejected.csv").exists()


def test_features_do_not_replace_the_images_that_they_are_of(packages: dict[str, Package], tmp_path: Path) -> None:
    source = _pictures(tmp_path / "in") / "set.npz"
    before = source.read_bytes()
    with pytest.raises(UserError, match="another file than the images"):
        embed_images(packages["encoder"], source, source, overwrite=True)
    assert source.read_bytes() == before
