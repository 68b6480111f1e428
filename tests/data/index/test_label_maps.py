"""Label maps among images: joined where name and grid fit one image, refused where not, and no image is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image, ImageDraw

from medim.data.index.index import Index, build_index
from medim.data.readers import find_reader
from medim.data.readers.base import LevelCounter
from medim.tasks import find_task
from tests.data.synthetic import noise, write_decathlon, write_nifti

SHAPE = (12, 11, 10)


def reasons(index: Index) -> dict[str, str]:
    return {rejection.path: rejection.reason for rejection in index.rejected}


def masks(index: Index) -> dict[str, str | None]:
    return {record.path: record.mask for record in index.records}


def blocks(*shape: int, values: tuple[int, ...] = (1,), seed: int = 0) -> np.ndarray[Any, Any]:
    """Blocks of each value in a background of 0."""
    array = np.zeros(shape, np.int16)
    for number, value in enumerate(values):
        array[tuple(slice(1 + (seed + number) % 3, size // 2 + number % 4) for size in shape)] = value
    return array


def scan(path: Path, seed: int = 0) -> Path:
    return write_nifti(path, noise(*SHAPE, seed=seed))


def label(path: Path, *values: int, seed: int = 0) -> Path:
    array = blocks(*SHAPE, values=values or (1,), seed=seed)
    if len(values) > 4:
        array = np.resize(np.repeat(values, array.size // len(values)), SHAPE[::-1]).T.astype(np.int16)
    return write_nifti(path, array.astype(np.uint8 if 0 <= array.min() <= array.max() < 256 else np.int16))


def picture(path: Path, array: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def film(path: Path, seed: int = 0) -> Path:
    return picture(path, noise(24, 20, seed=seed) / 4)


def outline(path: Path, value: int = 255) -> Path:
    return picture(path, blocks(24, 20, values=(value,)))


# --- joined: stem and grid agree, and exactly one fits

PAIRS: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "folders of images and masks": (
        ["images/a.nii.gz", "images/b.nii.gz"],
        ["masks/a.nii.gz", "masks/b.nii.gz"],
        {"images/a.nii.gz": "masks/a.nii.gz", "images/b.nii.gz": "masks/b.nii.gz"},
    ),
    "folders within splits": (
        ["train/images/a.nii.gz", "val/images/a.nii.gz"],
        ["train/labels/a.nii.gz", "val/labels/a.nii.gz"],
        {f"{part}/images/a.nii.gz": f"{part}/labels/a.nii.gz" for part in ("train", "val")},
    ),
    "a folder of labels with blanks, beside one of scans": (
        ["T1 films/a.nii.gz"],
        ["my masks/a_mask.nii.gz"],
        {"T1 films/a.nii.gz": "my masks/a_mask.nii.gz"},
    ),
    "a folder for each case": (
        ["p1/image.nii.gz", "p2/image.nii.gz"],
        ["p1/mask.nii.gz", "p2/mask.nii.gz"],
        {f"{case}/image.nii.gz": f"{case}/mask.nii.gz" for case in ("p1", "p2")},
    ),
    "sequences of a case": (
        [f"B_{k}/B_{k}_{s}.nii.gz" for k in (1, 10) for s in ("t1", "flair")],
        [f"B_{k}/B_{k}_seg.nii.gz" for k in (1, 10)],
        {f"B_{k}/B_{k}_{s}.nii.gz": f"B_{k}/B_{k}_seg.nii.gz" for s in ("t1", "flair") for k in (1, 10)},
    ),
    "sequences of a case in one folder": (
        [f"c_{k}_{s}.nii.gz" for k in (1, 10) for s in ("t1", "t2")],
        [f"c_{k}_seg.nii.gz" for k in (1, 10)],
        {f"c_{k}_{s}.nii.gz": f"c_{k}_seg.nii.gz" for k in (1, 10) for s in ("t1", "t2")},
    ),
    "a suffix": (["x.nii.gz", "y.nii.gz"], ["x_mask.nii.gz"], {"x.nii.gz": "x_mask.nii.gz", "y.nii.gz": ""}),
    "a prefix": (
        ["img_7.nii.gz", "img_8.nii.gz"],
        ["mask_7.nii.gz"],
        {"img_7.nii.gz": "mask_7.nii.gz", "img_8.nii.gz": ""},
    ),
    "a structure in the name": (
        ["x.nii.gz", "y.nii.gz"],
        ["x_tumour_label.nii.gz"],
        {"x.nii.gz": "x_tumour_label.nii.gz", "y.nii.gz": ""},
    ),
    "one mask of a case with sequences": (
        ["p1/t1.nii.gz", "p1/t2.nii.gz"],
        ["p1/segmentation.nii.gz"],
        {f"p1/{s}.nii.gz": "p1/segmentation.nii.gz" for s in ("t1", "t2")},
    ),
    "lesions of a BIDS tree": (
        ["sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz", "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz"],
        ["sub-1/ses-1/anat/sub-1_ses-1_label-L_desc-T1lesion_mask.nii.gz"],
        {
            "sub-1/ses-1/anat/sub-1_ses-1_T1w.nii.gz": "sub-1/ses-1/anat/sub-1_ses-1_label-L_desc-T1lesion_mask.nii.gz",
            "sub-1/ses-2/anat/sub-1_ses-2_T1w.nii.gz": "",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(("images", "labels", "pairs"), PAIRS.values(), ids=PAIRS)
def test_a_label_map_with_the_name_and_grid_of_an_image_is_its_mask(
    tmp_path: Path, images: list[str], labels: list[str], pairs: dict[str, str]
) -> None:
    for number, name in enumerate(images):
        scan(tmp_path / name, seed=number)
    for name in labels:
        label(tmp_path / name)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert masks(index) == {path: mask or None for path, mask in pairs.items()}
    assert index.rejected == ()
    assert index.classes == ("label-1",)


def test_pictures_are_joined_with_their_masks_in_every_way_of_saving_them(tmp_path: Path) -> None:
    for number, name in enumerate("abcde"):
        film(tmp_path / f"images/{name}.png", seed=number)
    outline(tmp_path / "masks/a.png", 1)
    outline(tmp_path / "masks/b_mask.png")
    picture(tmp_path / "masks/c.png", np.zeros((24, 20)))  # nothing in it
    palette = Image.fromarray(blocks(24, 20, values=(1, 2)).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "masks/d.png")
    soft = blocks(24, 20, values=(255,)) * 0.5 + noise(24, 20) / 9
    picture(tmp_path / "masks/e.png", soft.clip(0, 255))  # a mask that was saved with loss
    index = build_index(tmp_path, "xray", remember=False)
    pairs = {"a": "a", "b": "b_mask", "c": "c", "d": "d"}
    masks_by_image = {f"images/{name}.png": f"masks/{mask}.png" for name, mask in pairs.items()}
    assert masks(index) == masks_by_image | {"images/e.png": None}
    assert reasons(index) == {"masks/e.png": "looks-like-label"}
    assert "not with whole numbers of at most 64 classes" in index.rejected[0].detail


# --- refused: several fit, none fits, another grid, no mask


def test_several_label_maps_of_one_image_are_refused_with_the_way_to_join_them(tmp_path: Path) -> None:
    for case in ("s1", "s2"):
        scan(tmp_path / case / "mri.nii.gz", seed=ord(case[1]))
        for number, organ in enumerate(("liver", "spleen", "kidney_left")):
            label(tmp_path / case / "segmentations" / f"{organ}.nii.gz", seed=number)
    scan(tmp_path / "x.nii.gz")
    label(tmp_path / "x_liver_mask.nii.gz")
    label(tmp_path / "x_spleen_mask.nii.gz", seed=1)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert masks(index) == {"s1/mri.nii.gz": None, "s2/mri.nii.gz": None, "x.nii.gz": None}
    assert Counter(reasons(index).values()) == {"looks-like-label": 8}
    details = {rejection.path: rejection.detail for rejection in index.rejected}
    assert details["x_liver_mask.nii.gz"].startswith("2 label maps fit its image; to use them, combine them")
    assert all("--labels (columns image, mask)" in detail for detail in details.values())
    message = find_task("segmentation").describe_missing_targets(index)
    assert "none of 3 images has a mask. 8 files are label maps that could not be joined to an image" in message


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("p1/aparc+aseg.nii.gz", tuple(range(1001, 1099))),
        ("p1/aseg.nii.gz", tuple(range(1, 99))),
        ("p1/liver.nii.gz", (1,)),  # on the grid of the image beside it
        ("p1/seg/other.nii.gz", (1, 2)),
        ("labels/p9.nii.gz", (1,)),
        ("atlas/Schaefer.nii.gz", tuple(range(1, 400, 7))),
        ("p1/brainmask.nii.gz", (0,)),  # a scan without its skull is none, see below
    ],
)
def test_a_label_map_that_belongs_to_no_image_alone_is_refused(
    tmp_path: Path, name: str, values: tuple[int, ...]
) -> None:
    scan(tmp_path / "p1/T1.nii.gz")
    scan(tmp_path / "p2/T1.nii.gz", seed=1)
    if values == (0,):
        write_nifti(tmp_path / name, noise(*SHAPE, seed=5) * (blocks(*SHAPE) > 0))
        assert name in masks(build_index(tmp_path, "mri", keep_names=True, remember=False))
        return
    label(tmp_path / name, *values)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert len(index.records) == 2
    assert reasons(index) == {name: "looks-like-label"}


def test_atlases_and_probabilities_are_no_images(tmp_path: Path) -> None:
    scan(tmp_path / "tpl-X/tpl-X_res-1_T1w.nii.gz")
    label(tmp_path / "tpl-X/tpl-X_res-1_atlas-A_dseg.nii.gz", *range(1, 100))
    write_nifti(tmp_path / "tpl-X/tpl-X_res-1_label-GM_probseg.nii.gz", noise(*SHAPE) / 999)
    write_nifti(tmp_path / "other/T1_defacemask.nii.gz", noise(*SHAPE) / 999)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert [record.sequence or record.path for record in index.records] == ["tpl-X/tpl-X_res-1_T1w.nii.gz"]
    assert sorted(reasons(index).values()) == ["derived-label", "derived-label", "looks-like-label"]


def test_a_label_map_on_another_grid_or_with_values_of_no_mask_costs_no_image(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        scan(tmp_path / f"images/{name}.nii.gz", seed=ord(name))
    write_nifti(tmp_path / "masks/a.nii.gz", blocks(*SHAPE).astype(np.uint8), affine=np.diag([2.0, 1, 1, 1]))
    label(tmp_path / "masks/b.nii.gz", 1, -1)
    label(tmp_path / "masks/c.nii.gz", 1)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert masks(index) == {"images/a.nii.gz": None, "images/b.nii.gz": None, "images/c.nii.gz": "masks/c.nii.gz"}
    assert reasons(index) == {"masks/a.nii.gz": "looks-like-label", "masks/b.nii.gz": "looks-like-label"}


def test_a_table_of_masks_is_the_last_word(tmp_path: Path) -> None:
    for name in "ab":
        scan(tmp_path / f"s/images/{name}.nii.gz", seed=ord(name))
        label(tmp_path / f"s/masks/{name}.nii.gz", seed=ord(name))
    (tmp_path / "l.csv").write_text("image,mask\na,masks/a.nii.gz\n")
    index = build_index(tmp_path / "s", "mri", labels=tmp_path / "l.csv", keep_names=True, remember=False)
    assert masks(index) == {"images/a.nii.gz": "masks/a.nii.gz", "images/b.nii.gz": None}
    assert reasons(index) == {"masks/b.nii.gz": "looks-like-label"}


def test_a_nifti_that_declares_labels_is_joined_too(tmp_path: Path) -> None:
    scan(tmp_path / "x.nii.gz")
    image = nibabel.Nifti1Image(blocks(*SHAPE).astype(np.uint8), np.eye(4))
    image.header.set_intent(1002)
    nibabel.save(image, tmp_path / "x_seg.nii.gz")
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert (masks(index), index.rejected) == ({"x.nii.gz": "x_seg.nii.gz"}, ())


# --- no image is lost


def few_levels(path: Path, seed: int) -> Path:
    """A scan that was exported with four bits."""
    return write_nifti(path, noise(*SHAPE, seed=seed) // 70)


@pytest.mark.parametrize(
    "write",
    [
        lambda root: [few_levels(root / f"p{k}/T1.nii.gz", k) for k in range(3)],
        lambda root: [few_levels(root / "p1/T1.nii.gz", 1), scan(root / "p1/T2.nii.gz")],  # beside an image
        lambda root: [label(root / f"case{k}.nii.gz", 1, 2, seed=k) for k in range(2)],  # nothing beside them
        lambda root: [label(root / "phantom/a.nii.gz", 1, 2), scan(root / "T1/a.nii.gz")],  # not beside it
        lambda root: [scan(root / "masks/a.nii.gz"), scan(root / "labels/b.nii.gz")],  # misleading names alone
        lambda root: [scan(root / "images/a.nii.gz"), scan(root / "masked/a.nii.gz", 1)],  # without the skull
    ],
)
def test_scans_that_only_have_few_levels_or_only_a_name_stay_images(
    tmp_path: Path, write: Callable[[Path], list[Path]]
) -> None:
    paths = write(tmp_path)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert sorted(tmp_path / record.path for record in index.records) == sorted(paths)
    assert {record.mask for record in index.records} == {None}


def test_films_of_few_levels_and_of_classes_named_label_stay_images(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / "s" / f"label_{number % 2}"
        picture(folder / f"{number}.png", noise(24, 20, seed=number) // 250 * 80)
    index = build_index(tmp_path / "s", "xray", remember=False)
    assert (len(index.records), index.rejected) == (20, ())
    assert len(index.classes) == 2


def test_decathlon_folders_are_paired_as_before(tmp_path: Path) -> None:
    index = build_index(write_decathlon(tmp_path, names=["a", "b"]), "mri", remember=False)
    assert masks(index) == {f"imagesTr/{n}.nii.gz": f"labelsTr/{n}.nii.gz" for n in "ab"}


def test_levels_are_counted_over_all_parts_and_only_of_label_maps() -> None:
    counter = LevelCounter()
    for part in (blocks(20, 20, values=(3,)), blocks(20, 20, values=(-5, 9))):
        counter.update(part)
    assert counter.levels == 4
    assert counter.flatness > 0.7
    wide = blocks(9, 9) * np.float32(1 << 20)
    for array in (noise(40, 40), noise(40, 40) // 30, noise(40, 40) / 7, blocks(9, 9) + 0.5, wide):
        counter = LevelCounter()
        counter.update(array)
        assert counter.levels == 0


def head(background: int, levels: int) -> np.ndarray[Any, Any]:
    """A smooth ball of some levels in a constant background."""
    distance = np.hypot(*np.indices((40, 40)) - 19.5)
    ball = 1 - distance / 16 + 0.1 * np.sin(np.indices((40, 40))[0])
    return np.where(distance < 12, background + 1 + np.rint(ball.clip(0, 1) * (levels - 2)), background)


def organs(count: int, background: int = 0) -> np.ndarray[Any, Any]:
    """Squares of a number of classes in random order, with background between the rows."""
    side = int(np.ceil(np.sqrt(count)))
    values = np.resize(np.random.default_rng(0).permutation(np.arange(1, count + 1)), (side, side))
    array = np.kron(values, np.ones((9, 9), int))
    array[::9] = background
    return array


SCANS = {
    **{f"{n} levels on {background}": head(background, n) for n in (12, 30, 200, 900) for background in (0, 5, -1)},
    "enlarged": np.kron(head(5, 30), np.ones((4, 4))),
    "thresholded": np.where(head(0, 200) > 120, head(0, 200), 5),
    "probabilities of 100": np.rint(100 / (1 + np.exp(np.hypot(*np.indices((40, 40)) - 19.5) - 9))),
}
MAPS = {
    **{f"{n} classes on {background}": organs(n, background) for n in (1, 3, 20, 99, 400) for background in (0, -1)},
    "with an ignored value": np.where(np.indices((45, 45))[0] < 4, 255, organs(25)),
    "of an atlas with numbers": organs(99) * 7 + 1000,
    "of small lesions": (noise(40, 40) > 990).astype(int),
    "nested": np.digitize(head(0, 200), [50, 100, 150]),
}


@pytest.mark.parametrize(
    ("array", "is_label"),
    [*((scan, False) for scan in SCANS.values()), *((label_map, True) for label_map in MAPS.values())],
    ids=[*SCANS, *MAPS],
)
def test_levels_are_those_of_classes_and_not_of_grey_values(array: np.ndarray[Any, Any], is_label: bool) -> None:
    counter = LevelCounter()
    counter.update(array)
    assert (counter.levels > 0) == is_label


@pytest.mark.parametrize(
    ("array", "is_label"),
    [
        (SCANS["12 levels on 5"], False),
        (SCANS["enlarged"], False),
        (MAPS["99 classes on 0"], True),
        (MAPS["of small lesions"], True),
    ],
)
def test_a_volume_without_a_name_of_labels_is_judged_by_its_values(
    tmp_path: Path, array: np.ndarray[Any, Any], is_label: bool
) -> None:
    volume = np.stack([array] * 3, axis=-1).astype(np.int16)
    write_nifti(tmp_path / "T1.nii.gz", noise(*volume.shape))
    write_nifti(tmp_path / "T2.nii.gz", volume)
    index = build_index(tmp_path, "mri", keep_names=True, remember=False)
    assert reasons(index) == ({"T2.nii.gz": "looks-like-label"} if is_label else {})


def test_real_images_and_masks_are_told_apart_by_their_voxels(shared_data: Path) -> None:
    for folder, is_label in (("imagesTr", False), ("labelsTr", True)):
        paths = sorted((shared_data / "mri-acdc" / folder).glob("*.nii.gz"))[:4]
        paths += sorted((shared_data / "mri-left-atrium" / folder).glob("*.nii.gz"))[:2]
        for path in paths:
            reader = find_reader(path)
            assert reader is not None
            assert all((image.levels > 0) == is_label for image in reader.inspect(path).images)


# --- drawings among films


def test_drawings_and_screenshots_are_no_films_and_pages_are_flagged(tmp_path: Path) -> None:
    page = Image.new("L", (120, 90), 255)
    ImageDraw.Draw(page).text((5, 5), "Lorem ipsum dolor", fill=0)
    page.save(tmp_path / "page.png")
    diagram = Image.new("RGB", (120, 90), "white")
    ImageDraw.Draw(diagram).rectangle((10, 10, 70, 60), fill="steelblue")
    diagram.save(tmp_path / "diagram.png")
    window = Image.new("RGB", (120, 90), (30, 30, 30))
    ImageDraw.Draw(window).rectangle((0, 0, 119, 12), fill=(60, 60, 60))
    ImageDraw.Draw(window).rectangle((100, 2, 110, 10), fill="red")
    window.save(tmp_path / "window.png")
    heat = np.stack([noise(90, 120, seed=k) / 4 for k in range(3)], axis=-1)
    picture(tmp_path / "heat.png", heat)
    grey = noise(90, 120) / 4
    picture(tmp_path / "film.png", np.stack([grey] * 3, axis=-1))
    framed = np.zeros((90, 120))
    framed[20:70, 30:90] = grey[20:70, 30:90]
    picture(tmp_path / "framed.png", framed)
    enlarged = np.kron(noise(22, 30) / 4, np.ones((5, 5)))  # flat along each row
    page_of_film = np.full((90, 120), 255.0)
    page_of_film[20:65, 30:90] = grey[20:65, 30:90]
    for name, film in {"enlarged": enlarged, "few-levels": enlarged // 16 * 16, "on-white": page_of_film}.items():
        marked = np.stack([film] * 3, axis=-1)
        marked[22:28, 32:36] = 255, 255, 0  # letter L of a coloured marker
        picture(tmp_path / f"{name}.png", marked)
    index = build_index(tmp_path, "xray", keep_names=True, remember=False)
    assert reasons(index) == {"diagram.png": "looks-like-drawing", "window.png": "looks-like-drawing"}
    flags = {record.path: (record.quality or "").split()[1:] for record in index.records}
    assert flags == {
        "page.png": ["drawing-like"],
        "heat.png": ["coloured", "colour-to-grey"],
        "film.png": ["colour-to-grey"],
        "framed.png": [],
        "enlarged.png": ["drawing-like", "colour-to-grey"],
        "few-levels.png": ["drawing-like", "colour-to-grey"],
        "on-white.png": ["drawing-like", "colour-to-grey"],
    }


def test_real_films_are_no_drawings(shared_data: Path) -> None:
    films = sorted((shared_data / "xray-kermany" / "images").glob("*.jpg"))[::400]
    films += sorted((shared_data / "full-size" / "xray-nih").rglob("*.png"))
    assert len(films) > 10
    for path in films:
        reader = find_reader(path)
        assert reader is not None
        [image] = reader.inspect(path).images
        assert not {"coloured", "drawing-like"} & set(image.quality)
        assert image.levels == 0


# --- one mask is of one image, and one name of one structure

AMBIGUOUS: dict[str, tuple[list[str], list[str]]] = {
    "two visits of a case": (["s0/baseline.nii.gz", "s0/month12.nii.gz"], ["s0/seg.nii.gz"]),
    "four subjects in one folder": (
        [f"sub_{k:02d}_T1.nii.gz" for k in range(4)],
        ["sub_mask.nii.gz"],
    ),
    "different structures of different cases": (
        [f"p{k}/t1.nii.gz" for k in range(4)],
        [f"p{k}/t1_{'brainmask' if k < 2 else 'lesionmask'}.nii.gz" for k in range(4)],
    ),
    "different structures as words of their own": (
        [f"p{k}_t1.nii.gz" for k in range(4)],
        [f"p{k}_t1_{'brain' if k < 2 else 'lesion'}_seg.nii.gz" for k in range(4)],
    ),
    "a structure that other cases have beside another one": (
        [f"p{k}/t1.nii.gz" for k in range(3)],
        [*(f"p{k}/t1_brainmask.nii.gz" for k in range(3)), *(f"p{k}/t1_lesionmask.nii.gz" for k in range(2))],
    ),
}


@pytest.mark.parametrize(("scans", "labels"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_a_mask_that_may_be_of_several_images_or_structures_is_joined_to_none(
    tmp_path: Path, scans: list[str], labels: list[str]
) -> None:
    for number, name in enumerate(scans):
        scan(tmp_path / name, seed=number)
    for name in labels:
        label(tmp_path / name)
    index = build_index(tmp_path, "mri", keep_names=True)
    assert masks(index) == dict.fromkeys(scans)
    assert set(reasons(index).values()) == {"looks-like-label"}
    assert len(index.rejected) == len(labels)


def test_a_mask_of_a_run_is_not_that_of_another_run(tmp_path: Path) -> None:
    for run in (1, 2):
        scan(tmp_path / "sub-01" / "anat" / f"sub-01_run-{run}_T1w.nii.gz", seed=run)
    label(tmp_path / "derivatives" / "sub-01" / "sub-01_run-1_dseg.nii.gz")
    index = build_index(tmp_path, "mri", keep_names=True)
    assert {path.rpartition("/")[2]: mask is not None for path, mask in masks(index).items()} == {
        "sub-01_run-1_T1w.nii.gz": True,
        "sub-01_run-2_T1w.nii.gz": False,
    }


@pytest.mark.parametrize(
    ("films", "outlines"),
    [
        (["p1/frontal.png", "p1/lateral.png"], ["p1/mask.png"]),
        (["images/p1_pa.png", "images/p1_lat.png"], ["masks/p1.png"]),
        (["train/0.png", "test/0.png"], ["masks/0.png"]),
    ],
)
def test_a_mask_of_pictures_is_joined_to_one_picture_only(
    tmp_path: Path, films: list[str], outlines: list[str]
) -> None:
    for number, name in enumerate(films):
        film(tmp_path / name, seed=number)
    for name in outlines:
        outline(tmp_path / name)
    index = build_index(tmp_path, "xray", keep_names=True)
    assert masks(index) == dict.fromkeys(films)
