from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from medim.data.example import brain
from medim.data.example.cohort import ExampleFormat, make_example, plan_cohort, simulate_scans
from medim.data.index.index import build_index
from medim.data.loading.splits import assign_splits
from medim.files import file_sha256, read_json
from medim.types import Array, UsageError, UserError

nibabel: Any = pytest.importorskip("nibabel")
pydicom: Any = pytest.importorskip("pydicom")
pytest.importorskip("nilearn", reason="the cohort is made from the template that nilearn ships: pip install '.[train]'")

SUBJECTS, SPACING = 4, 4.0
BOTH: tuple[ExampleFormat, ...] = ("nifti", "dicom")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cohort") / "example"
    assert make_example(out, subjects=SUBJECTS, spacing=SPACING, formats=BOTH) == out
    return out


@pytest.fixture(scope="module")
def template() -> brain.BrainTemplate:
    return brain.load_template(SPACING)


@pytest.fixture(scope="module")
def anatomies(template: brain.BrainTemplate) -> dict[bool, list[Array]]:
    return {
        enlarged: [brain.draw_anatomy(template, np.random.default_rng(i), enlarged=enlarged) for i in range(4)]
        for enlarged in (False, True)
    }


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def nifti(cohort: Path, name: str, kind: str = "imagesTr") -> tuple[Array, Array]:
    image = nibabel.load(cohort / "nifti" / kind / f"{name}.nii.gz")
    return np.asarray(image.dataobj), image.affine


def names(cohort: Path) -> list[str]:
    return sorted(path.name.removesuffix(".nii.gz") for path in (cohort / "nifti" / "imagesTr").iterdir())


def table(path: Path) -> dict[str, str]:
    header, *rows = path.read_text().splitlines()
    assert header.startswith("image,")
    return dict(row.split(",") for row in rows)


def dice(a: Array, b: Array) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def central_csf(tissue: Array, affine: Array) -> float:
    """Millilitres of "other" in a box around the lateral ventricles."""
    index = np.argwhere(tissue == 3)
    x, y, z = (index @ affine[:3, :3].T + affine[:3, 3]).T
    inside = (abs(x) < 40) & (y > -70) & (y < 45) & (z > 0) & (z < 40)
    return float(inside.sum() * abs(np.linalg.det(affine)) / 1000)


def series_folder(cohort: Path, name: str) -> Path:
    return cohort / "dicom" / f"scan-{names(cohort).index(name) + 501}"


def series(cohort: Path, name: str) -> list[Any]:
    return [pydicom.dcmread(path) for path in sorted(series_folder(cohort, name).glob("*.dcm"))]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(cohort: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medim.data.example.cohort import make_example; "
        f"make_example(Path(sys.argv[1]), subjects={SUBJECTS}, spacing={SPACING}, formats={BOTH})"
    )
    surroundings = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=surroundings)
    again = files(tmp_path / "again")
    assert {**again, ".medim": ""} == {**files(cohort), ".medim": ""}  # the record contains the process


def test_another_seed_gives_other_subjects(cohort: Path) -> None:
    scan = next(simulate_scans(1, spacing=SPACING, seed=1))
    image, _ = nifti(cohort, "EX-001_1")
    assert scan.image.shape == image.shape
    assert not np.array_equal(scan.tissue, nifti(cohort, "EX-001_1", "labelsTr")[0])
    assert not np.array_equal(scan.image, image)


def test_a_smaller_cohort_is_the_beginning_of_a_larger_one(cohort: Path) -> None:
    scan = next(simulate_scans(1, spacing=SPACING))
    np.testing.assert_array_equal(scan.image, nifti(cohort, "EX-001_1")[0])
    assert plan_cohort(7, seed=3) == plan_cohort(24, seed=3)[:7]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("subjects", [1, 4, 24, 25])
def test_classes_are_balanced_and_a_third_has_two_scans(subjects: int, seed: int) -> None:
    people = plan_cohort(subjects, seed=seed)
    assert len(people) == subjects
    assert abs(2 * sum(enlarged for enlarged, _ in people) - subjects) <= 1
    assert abs(sum(sessions == 2 for _, sessions in people) - subjects / 3) < 1
    assert {sessions for _, sessions in people} <= {1, 2}


def test_the_msd_layout_lists_every_scan_with_its_label_subject_and_class(cohort: Path) -> None:
    expected = [f"EX-{i:03d}_{s}" for i, (_, n) in enumerate(plan_cohort(SUBJECTS, seed=0), 1) for s in range(1, n + 1)]
    assert names(cohort) == expected
    content = read_json(cohort / "nifti" / "dataset.json")
    assert content["labels"] == {"0": "background", "1": "grey", "2": "white", "3": "other"}
    assert content["numTraining"] == len(expected)
    for name, entry in zip(expected, content["training"], strict=True):
        assert entry == {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
        assert (cohort / "nifti" / entry["label"]).is_file()
    enlarged = {f"EX-{i:03d}" for i, (enlarged, _) in enumerate(plan_cohort(SUBJECTS, seed=0), 1) if enlarged}
    for folder in ("nifti", "dicom"):
        keys = {n: f"{n}.nii.gz" if folder == "nifti" else series_folder(cohort, n).name for n in expected}
        assert table(cohort / folder / "subjects.csv") == {keys[n]: n.split("_")[0] for n in expected}
        classes = {keys[n]: "enlarged" if n.split("_")[0] in enlarged else "normal" for n in expected}
        assert table(cohort / folder / "labels.csv") == classes


def test_both_formats_have_the_same_split_whatever_the_site_key(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So an encoder of one format has not been trained on the validation images of the other."""
    for key in ("1" * 64, "2" * 64):
        monkeypatch.setenv("MEDIM_SITE_KEY", key)
        indexes = [build_index(cohort / folder, "mri") for folder in ("nifti", "dicom")]
        splits = [[assign_splits(index)[record.image] for record in index.records] for index in indexes]
        assert splits[0] == splits[1]
        assert indexes[0].records[0].subject == indexes[1].records[0].subject


def test_images_are_positive_and_tissues_lie_on_their_grid(cohort: Path) -> None:
    for name in names(cohort):
        image, affine = nifti(cohort, name)
        tissue, label_affine = nifti(cohort, name, "labelsTr")
        assert image.dtype == np.int16
        assert image.min() > 0
        assert np.unique(tissue).tolist() == [0, 1, 2, 3]
        assert tissue.shape == image.shape
        np.testing.assert_array_equal(label_affine, affine)
        np.testing.assert_array_equal(np.diag(affine), [SPACING, SPACING, SPACING, 1])
        means = [image[tissue == value].mean() for value in (0, 3, 1, 2)]
        assert means == sorted(means), "a T1-weighted brain: background < CSF < grey < white"


def test_scans_overlay_the_template_to_within_the_deformation(cohort: Path, template: brain.BrainTemplate) -> None:
    for name in names(cohort):
        tissue, affine = nifti(cohort, name, "labelsTr")
        grid = brain.VoxelGrid((affine[0, 3], affine[1, 3], affine[2, 3]), SPACING, tissue.shape)
        mean = brain.label_tissues(
            brain.deform_template(template, np.zeros((3, *brain.CONTROL_GRID.shape), np.float32), grid)
        )
        assert dice(tissue > 0, mean > 0) > 0.9
        assert dice(tissue[::-1] > 0, np.roll(mean, 10, 1) > 0) < 0.85  # the measure would notice a wrong origin


def test_two_scans_of_a_subject_share_the_anatomy_and_not_the_intensities(cohort: Path) -> None:
    twice = [name for name in names(cohort) if name.endswith("_2")]
    assert twice
    for second in twice:
        first = second.replace("_2", "_1")
        other = next(name for name in names(cohort) if name.split("_")[0] != second.split("_")[0])
        a, b, c = (nifti(cohort, name, "labelsTr")[0] for name in (first, second, other))
        for value in (1, 2, 3):
            assert dice(a == value, b == value) > dice(a == value, c == value) + 0.1
        assert dice(a == 1, b == 1) > 0.8
        assert dice(a == 2, b == 2) > 0.8
        white = [nifti(cohort, name)[0][tissue == 2].mean() for name, tissue in ((first, a), (second, b))]
        assert max(white) / min(white) > 1.05


def test_enlarged_subjects_have_larger_ventricles_in_the_labels(cohort: Path) -> None:
    classes = table(cohort / "nifti" / "labels.csv")
    volumes: dict[str, list[float]] = {"enlarged": [], "normal": []}
    for name in names(cohort):
        volumes[classes[f"{name}.nii.gz"]].append(central_csf(*nifti(cohort, name, "labelsTr")))
    assert min(volumes["enlarged"]) > 1.2 * max(volumes["normal"])


def test_enlarged_ventricles_are_a_local_expansion(template: brain.BrainTemplate) -> None:
    grid = brain.VoxelGrid.around_brain(margin=0.0, spacing=2.0)
    inward = brain.integrate_velocity(-2 * template.expansion)
    shown = brain.deform_template(template, inward, grid)[2] > 0.5
    normal = brain.deform_template(template, np.zeros_like(inward), grid)[2] > 0.5
    ventricles = brain._segment_ventricles(shown.astype(np.float32), grid)
    assert ventricles.sum() > 1.5 * brain._segment_ventricles(normal.astype(np.float32), grid).sum()
    far = ndimage.distance_transform_edt(~ventricles) * grid.spacing > 15
    local = brain.compute_jacobian(inward, grid)
    assert local[ventricles].mean() < 0.75
    np.testing.assert_allclose(local[far], 1, atol=0.03)


def test_deformations_are_of_a_few_millimetres_and_fold_nowhere(anatomies: dict[bool, list[Array]]) -> None:
    grid = brain.VoxelGrid.around_brain(margin=0.0, spacing=2.0)
    for displacement in (d for group in anatomies.values() for d in group):
        length = np.linalg.norm(displacement, axis=0)
        assert 2 < length.mean() < 10
        assert length.max() < 20
        assert brain.compute_jacobian(displacement, grid).min() > 0.05


def test_the_exponential_of_a_linear_velocity_is_the_known_one() -> None:
    points = brain.CONTROL_GRID.voxel_centres()
    displacement = brain.integrate_velocity(np.float32(0.1) * points)
    inner = np.abs(points).max(0) < 60  # what flows in from outside the grid is not known there
    np.testing.assert_allclose(displacement[:, inner], (np.expm1(0.1) * points)[:, inner], atol=0.05)


@pytest.mark.parametrize("name", ["EX-001_1", "EX-002_1"])
def test_the_dicom_series_is_the_nifti_volume(cohort: Path, name: str) -> None:
    image, affine = nifti(cohort, name)
    slices = series(cohort, name)
    assert [int(s.InstanceNumber) for s in slices] == list(range(1, image.shape[2] + 1))
    stack = np.stack([s.pixel_array.T for s in slices], axis=2)  # (columns, rows, slices)
    np.testing.assert_array_equal(stack[::-1, ::-1], image)

    row, column = np.reshape(slices[0].ImageOrientationPatient, (2, 3)).astype(float)
    lps = np.eye(4)
    lps[:3, 0] = row * float(slices[0].PixelSpacing[1])
    lps[:3, 1] = column * float(slices[0].PixelSpacing[0])
    first, last = (np.array(s.ImagePositionPatient, float) for s in (slices[0], slices[-1]))
    lps[:3, 2] = (last - first) / (len(slices) - 1)
    lps[:3, 3] = first
    ras = np.diag([-1, -1, 1, 1]) @ lps
    corner = np.array([0, 0, 0, 1])
    opposite = np.array([image.shape[0] - 1, image.shape[1] - 1, 0, 1])
    np.testing.assert_allclose(ras @ corner, affine @ opposite, atol=1e-4)
    np.testing.assert_allclose(ras[:3, :3] @ np.diag([-1, -1, 1]), affine[:3, :3], atol=1e-4)


def test_simpleitk_reads_the_same_volume_from_both_formats(cohort: Path) -> None:
    sitk: Any = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series_folder(cohort, "EX-003_1"))))
    dicom = reader.Execute()
    other = sitk.ReadImage(str(cohort / "nifti" / "imagesTr" / "EX-003_1.nii.gz"))
    other = sitk.DICOMOrient(other, "LPS")
    np.testing.assert_allclose(dicom.GetOrigin(), other.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(dicom.GetSpacing(), other.GetSpacing(), atol=1e-4)
    np.testing.assert_allclose(dicom.GetDirection(), other.GetDirection(), atol=1e-6)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(dicom), sitk.GetArrayFromImage(other))


def test_uids_tell_scans_apart_and_hold_a_series_together(cohort: Path) -> None:
    scans = {name: series(cohort, name) for name in names(cohort)}
    for name, slices in scans.items():
        for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
            assert len({str(s[key].value) for s in slices}) == 1
        number = name[3:6]
        assert (str(slices[0].PatientName), slices[0].PatientID) == (f"EXAMPLE^{number}", f"EX-{number}")
    for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert len({str(slices[0][key].value) for slices in scans.values()}) == len(scans)
    instances = [str(s.SOPInstanceUID) for slices in scans.values() for s in slices]
    assert len(set(instances)) == len(instances)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed: apt-get install dicom3tools")
def test_dciodvfy_finds_no_error_in_the_dicom_files(cohort: Path, tmp_path: Path) -> None:
    make_example(tmp_path / "odd", subjects=1, spacing=20 / 3, formats=["dicom"])  # numbers that do not end
    paths = sorted((tmp_path / "odd").rglob("*.dcm"))[::7]
    for name in names(cohort):
        paths += sorted(series_folder(cohort, name).glob("*.dcm"))[::15]
    assert len(paths) > 5
    for path in paths:
        report = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, check=False)
        said = report.stdout + report.stderr
        assert "MRImage" in said
        assert "Error" not in said, f"{path}: {said}"


def test_an_interrupted_run_leaves_no_cohort(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert (done, total) == (1, 3)
        raise KeyboardInterrupt

    out = tmp_path / "deep" / "example"
    with pytest.raises(KeyboardInterrupt):
        make_example(out, subjects=2, spacing=8.0, formats=BOTH, seed=seed_with(2, scans=3), progress=interrupt)
    assert list(out.parent.iterdir()) == []


def seed_with(subjects: int, *, scans: int) -> int:
    return next(seed for seed in range(100) if sum(n for _, n in plan_cohort(subjects, seed=seed)) == scans)


def test_a_folder_that_holds_something_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="expected an empty or new folder"):
        make_example(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_without_nilearn_the_error_names_the_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(UserError, match=r'pip install "\.\[train\]"'):
        make_example(tmp_path / "example")
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda out: make_example(out, subjects=0), "subjects must be 1 to 999, got 0"),
        (lambda out: make_example(out, spacing=0.5), r"spacing must be 1 to 8 mm, got 0\.5"),
        (lambda out: make_example(out, spacing=float("nan")), "spacing must be 1 to 8 mm, got nan"),
        (lambda out: make_example(out, seed=-1), "seed must be 0 or more, got -1"),
        (lambda out: make_example(out, formats=["nifty"]), "nifti, dicom; got nifty"),  # type: ignore[list-item]
        (lambda out: make_example(out, formats=[]), "got none"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(
    call: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        call(tmp_path / "example")
    assert not (tmp_path / "example").exists()
