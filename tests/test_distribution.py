"""The light and the full installation from the built wheel, outside the source tree."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import medim
from medim.data.preprocessing.steps import preprocess
from medim.evaluation.evaluate import open_network
from medim.export.builder import ExportOptions
from medim.export.export import export
from medim.inference.network import run_inference
from medim.models.serialization import load_model, save_model
from tests.export.checkers import dciodvfy_errors
from tests.export.packages import make_run, make_run_with_critic

REPOSITORY = Path(__file__).resolve().parent.parent
MEASURED = runpy.run_path(str(REPOSITORY / "benchmarks" / "light_install.py"))
pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, succeeds: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command outside the tree, without this environment's PYTHON* variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ran = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True, check=False
    )
    assert (ran.returncode == 0) is succeeds, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}"
    return ran


def content(wheel: Path) -> dict[str, bytes]:
    """Every file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, REPOSITORY, cwd=out)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("medim_infomax-*.whl")
    return path


@pytest.fixture(scope="module")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of a fresh environment that holds the light install alone, at the tested versions."""
    folder = tmp_path_factory.mktemp("light")
    venv.create(folder / "venv", with_pip=True)
    binaries = folder / "venv" / "bin"
    constraints = REPOSITORY / "constraints.txt"
    run(binaries / "python", "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel, cwd=folder)
    run(binaries / "python", "-m", "pip", "check", cwd=folder)
    return binaries


def test_the_wheel_holds_the_presets_and_the_type_marker_and_no_test(wheel: Path) -> None:
    names = content(wheel)
    presets = {f"medim/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert presets
    assert presets <= set(names)
    assert "medim/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"medim", f"medim_infomax-{medim.version.__version__}.dist-info"}


def test_the_sdist_builds_the_very_wheel_that_the_tree_builds(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, REPOSITORY, cwd=tmp_path)
    (from_tree,) = tmp_path.glob("medim_infomax-*.whl")
    assert content(from_tree) == content(wheel)


def test_the_light_install_has_no_torch_and_answers(light: Path, tmp_path: Path) -> None:
    run(light / "python", "-c", "import torch", cwd=tmp_path, succeeds=False)
    assert "pretrain" in run(light / "medim", "--help", cwd=tmp_path).stdout
    assert medim.version.__version__ in run(light / "medim", "--version", cwd=tmp_path).stdout
    presets = run(light / "medim", "config", "list", cwd=tmp_path).stdout
    assert {"mri", "xray"} <= set(presets.split())


def test_a_command_whose_extra_is_missing_says_which_to_install(light: Path, tmp_path: Path) -> None:
    ran = run(light / "medim", "pretrain", "--modality", "mri", "--out", "run", cwd=tmp_path, succeeds=False)
    assert ran.returncode == 1
    assert "[train]" in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr


def test_the_light_install_reads_and_indexes_images(light: Path, tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(720, dtype=np.float32).reshape(8, 9, 10), np.eye(4))
    nibabel.save(image, tmp_path / "a.nii.gz")
    shape = run(light / "python", "-c", "import medim; print(medim.read_volume('a.nii.gz').array.shape)", cwd=tmp_path)
    assert shape.stdout.strip() == "(1, 8, 9, 10)"
    run(light / "medim", "index", "a.nii.gz", "--modality", "mri", "--out", "index", cwd=tmp_path)
    assert len((tmp_path / "index" / "index.csv").read_text().splitlines()) == 2


def test_the_light_install_verifies_a_package_and_predicts_and_embeds_with_it(
    light: Path, shared_data: Path, tmp_path: Path
) -> None:
    export(
        make_run(tmp_path / "segmenter-run", "segmenter"),
        tmp_path / "segmenter",
        ExportOptions(label_codes="hippocampus"),
    )
    export(make_run_with_critic(tmp_path / "encoder-run"), tmp_path / "encoder")
    run(light / "medim", "verify", "segmenter", cwd=tmp_path)
    series = shared_data / "mri-dicom" / "Study1" / "13_HCropVolume"
    nifti = next((shared_data / "mri-hippocampus" / "imagesTr").glob("*.nii.gz"))
    run(light / "medim", "predict", "segmenter", series, nifti, "--out", "masks", cwd=tmp_path)
    masks = [nibabel.load(path) for path in sorted((tmp_path / "masks").rglob("*.nii.gz"))]
    assert len(masks) == 2
    assert any(np.array_equal(mask.affine, nibabel.load(nifti).affine) for mask in masks)
    run(
        light / "medim",
        "predict",
        "segmenter",
        series,
        "--format",
        "dicom",
        "--labelmap",
        "--out",
        "dicom",
        cwd=tmp_path,
    )
    assert sorted(path.suffixes[-2] for path in (tmp_path / "dicom").glob("*.dcm")) == [".seg", ".sr"]
    picture = np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))
    np.save(tmp_path / "picture.npy", picture)
    run(
        light / "medim",
        "embed",
        "encoder",
        "picture.npy",
        "--out",
        "features.csv",
        "--mi-map-dir",
        "maps",
        cwd=tmp_path,
    )
    assert len((tmp_path / "features.csv").read_text().splitlines()) == 2
    assert len((tmp_path / "maps" / "maps.csv").read_text().splitlines()) == 2


def without_network() -> None:
    try:
        MEASURED["find_namespace_command"]()
    except SystemExit as error:
        pytest.skip(str(error))


def know_both_labels(run: Path, image: Path) -> None:
    """Set the last layer of random weights so that about three tenths of an image are of either label."""
    network, _ = open_network(run)
    one = run_inference(network.run, preprocess(medim.read_volume(image), network.preprocessing), network.inference)[1]
    low, high = (float(level) for level in np.quantile(one, (0.3, 0.7)))
    assert low < high
    model, spec = load_model(run)
    last = model.head.conv
    with torch.no_grad():
        last.bias[1] -= (low + high) / 2
        last.weight[2], last.bias[2] = -last.weight[1], -last.bias[1]
        last.weight[0], last.bias[0] = 0.0, (high - low) / 2
    save_model(run / "model", "model", model, spec)


def test_a_segmenter_answers_without_torch_and_network_as_it_does_under_torch(
    light: Path, shared_data: Path, tmp_path: Path
) -> None:
    without_network()
    trained = make_run(tmp_path / "segmenter-run", "segmenter")  # random weights; the benchmark trains
    know_both_labels(trained, shared_data / MEASURED["SERIES"]["HCropVolume, Study1"])
    package = MEASURED["export_package"](tmp_path, "segmenter", trained)
    for number, (name, place) in enumerate(MEASURED["SERIES"].items()):
        found = MEASURED["compare_segmentation"](light, package, trained, shared_data / place, tmp_path / str(number))
        assert found["exit"] == 0
        if name.startswith("HCropVolume"):
            assert min(found["voxels_1"], found["voxels_2"]) > 100
            assert min(found["dice_1"], found["dice_2"]) >= 0.9999
        assert found["differ"] <= 1e-5 * found["voxels"], name


def test_a_classifier_answers_x_rays_there_too_and_refuses_what_it_is_not_for(
    light: Path, shared_data: Path, tmp_path: Path
) -> None:
    without_network()
    trained = make_run(tmp_path / "classifier-run", "classifier")
    package = MEASURED["export_package"](tmp_path, "classifier", trained)
    found = MEASURED["compare_classification"](light, package, trained, shared_data, tmp_path / "classes")
    assert found["images"] == 5
    assert found["largest_difference"] < 1e-4
    assert found["reports"] == ["Comprehensive 3D SR Storage"] * 5
    assert dciodvfy_errors(*sorted((tmp_path / "classes" / "dicom").glob("*.dcm"))) == []
    refused = MEASURED["check_rejections"](light, package, shared_data, tmp_path / "refused")
    assert refused == {
        "body part": {"exit": 4, "reasons": ["wrong-body-part"]},
        "modality": {"exit": 4, "reasons": ["wrong-modality"]},
    }


def test_the_wheel_with_the_train_extra_runs_from_outside_the_tree(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (here,) = {path for path in sys.path if path.endswith("site-packages")}
    (site / "tested.pth").write_text(f"{here}\n")  # the extra's packages, from this environment, but not its medim
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
    ran = run(python, "-c", "import medim.training.pretrain.run; print(medim.__file__)", cwd=tmp_path)
    assert ran.stdout.strip() == str(site / "medim" / "__init__.py")
    assert "mri" in run(tmp_path / "venv" / "bin" / "medim", "config", "list", cwd=tmp_path).stdout.split()
