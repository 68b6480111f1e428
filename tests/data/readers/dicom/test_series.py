"""Series to stacks: which slices belong together, and that none gets lost; against a slow reference."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.uid import generate_uid

from medim.data.index.index import AllRejectedError, build_index
from medim.data.readers import DICOM
from medim.data.readers.dicom import pixels
from medim.data.readers.dicom.pixels import decode_frames
from tests.data.synthetic import AXIAL, dataset, noise, save, scan, write_series

SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (0.991332, 0.114987, -0.063548, -0.118794, 0.991118, -0.059771)
ORIENTATIONS = {"axial": AXIAL, "sagittal": SAGITTAL, "oblique": OBLIQUE}
KEYS = ("EchoNumbers", "EchoTime", "AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime", "FlipAngle")


def told(folder: Path) -> tuple[list[set[str]], list[tuple[str, str]], list[tuple[str, ...]]]:
    """Files of each image, first file and reason of what is none, and qualities."""
    found, refused = scan(DICOM, sorted(folder.iterdir()), "mri")
    images = [{path.name for path in image.files} for image in found]
    return images, sorted((one.path.name, one.reason) for one in refused), [image.quality for image in found]


def repeated(folder: Path, times: int, tag: str, values: Sequence[Any], **tags: Any) -> None:
    """One place scanned several times, 4 slices each; a file is named by its turn."""
    for turn in range(times):
        paths = write_series(folder / str(turn), noise(4, 4, 6, seed=turn), **{tag: values[turn]}, **tags)
        for path in paths:
            path.rename(folder / f"{turn}-{path.name}")
        (folder / str(turn)).rmdir()


@pytest.mark.parametrize(
    ("tag", "values"),
    [
        ("EchoNumbers", [1, 2, 3]),
        ("EchoTime", [2.3, 4.6, 6.9]),
        ("AcquisitionNumber", [1, 2, 3]),
        ("TemporalPositionIdentifier", [1, 2, 3]),
        ("DiffusionBValue", [0.0, 500.0, 1000.0]),
        ("DiffusionGradientOrientation", [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]),
        ("ImageType", [["DERIVED", "PRIMARY", "DIXON", kind] for kind in ("WATER", "FAT", "IN_PHASE")]),
        ("ComplexImageComponent", ["MAGNITUDE", "PHASE", "REAL"]),
        ("TriggerTime", [0, 40, 80]),
        ("InversionTime", [100, 500, 900]),
        ("FlipAngle", [3, 9, 15]),
    ],
)
def test_scans_of_one_place_are_told_apart(tmp_path: Path, tag: str, values: list[Any]) -> None:
    repeated(tmp_path, 3, tag, values)
    images, refused, _ = told(tmp_path)
    assert images == [{f"{turn}-{k}.dcm" for k in range(4)} for turn in range(3)]
    assert refused == []
    index = build_index(tmp_path, "mri", remember=False)
    assert len({record.image for record in index.records}) == 3
    for turn, record in enumerate(index.records):
        assert index.open(record).array.sum() == noise(4, 4, 6, seed=turn).sum()


def test_two_keys_tell_apart_what_one_cannot(tmp_path: Path) -> None:
    for echo in (1, 2):
        for kind in ("M", "P"):
            repeated(tmp_path / f"{echo}{kind}", 1, "EchoNumbers", [echo], ImageType=["ORIGINAL", "PRIMARY", kind])
            for path in (tmp_path / f"{echo}{kind}").iterdir():
                path.rename(tmp_path / f"{echo}{kind}{path.name}")
            (tmp_path / f"{echo}{kind}").rmdir()
    images, refused, _ = told(tmp_path)
    assert sorted(map(len, images)) == [4, 4, 4, 4]
    assert all(len({name[:2] for name in image}) == 1 for image in images)
    assert refused == []


def test_a_key_that_counts_the_slices_of_one_volume_splits_nothing(tmp_path: Path) -> None:
    each = [{"AcquisitionNumber": k, "TriggerTime": 30 * k, "EchoTime": 4.6 + 0.00001 * k} for k in range(5)]
    write_series(tmp_path, each=each)
    assert [len(image) for image in told(tmp_path)[0]] == [5]


@pytest.mark.parametrize("values", [[None, None], [1, 1], [0, 1]], ids=["no number", "one number", "a number of 0"])
def test_scans_that_no_key_tells_apart_are_refused(tmp_path: Path, values: list[int | None]) -> None:
    repeated(tmp_path, 2, "InstanceNumber", values)
    assert told(tmp_path) == ([], [("0-0.dcm", "duplicate-position")], [])


def time_series(folder: Path, volumes: int, slices: int, number: Any, **tags: Any) -> None:
    """Volumes that InstanceNumber alone tells apart; `number(volume, slice)` gives it, None leaves the file out."""
    places = [[10.0, 20.0, 30.0 + 2 * k] for k in range(slices)]
    for volume in range(volumes):
        for k in range(slices):
            if (count := number(volume, k)) is not None:
                own = {name: value(volume, k) if callable(value) else value for name, value in tags.items()}
                made = dataset(noise(4, 6, seed=k) + 10 * volume, ImagePositionPatient=places[k], **own)
                made.InstanceNumber = count
                save(made, folder / f"{count:05d}-{volume}-{k}.dcm")


def volumes_of(folder: Path) -> list[set[str]]:
    """Numbers of the volumes that the files of each image are of."""
    return [{name.split("-")[1] for name in image} for image in told(folder)[0]]


ORDERS = {
    "volume by volume": lambda volume, k: 100 * volume + k + 1,
    "slice by slice": lambda volume, k: 10 * k + volume + 1,
    "up and down": lambda volume, k: 4 * volume + (k if volume % 2 else 3 - k) + 1,
    "with gaps": lambda volume, k: 200 * volume + 7 * k + 5,
}


@pytest.mark.parametrize("order", ORDERS)
def test_volumes_are_told_apart_by_the_number_at_each_place(tmp_path: Path, order: str) -> None:
    time_series(tmp_path, 5, 4, ORDERS[order], AcquisitionNumber=lambda volume, k: k + 1)
    assert volumes_of(tmp_path) == [{str(volume)} for volume in range(5)]
    index = build_index(tmp_path, "mri", remember=False)
    means = [index.open(record).array.mean() for record in index.records]
    np.testing.assert_allclose(np.diff(means), 10.0, atol=1e-3)


def test_volumes_numbered_slice_by_slice_are_not_mixed_if_each_place_lost_one(tmp_path: Path) -> None:
    lost = {(0, 0), (1, 1), (2, 2), (0, 3)}  # volume and slice
    time_series(tmp_path, 3, 4, lambda volume, k: None if (volume, k) in lost else 3 * k + volume + 1)
    assert told(tmp_path)[0] == []


def test_volumes_of_an_order_stay_within_their_echo_and_component(tmp_path: Path) -> None:
    """Magnitude and phase of five times: within a place the numbers of the parts do not follow one order."""

    def number(volume: int, k: int) -> int:
        time, part = divmod(volume, 2)
        return 100 * time + 10 * ((part + k) % 2) + k + 1

    time_series(tmp_path, 10, 4, number, ComplexImageComponent=lambda volume, k: ("MAGNITUDE", "PHASE")[volume % 2])
    assert sorted(map(sorted, volumes_of(tmp_path))) == [[str(volume)] for volume in range(10)]


def test_a_series_that_was_stopped_keeps_its_whole_volumes(tmp_path: Path) -> None:
    time_series(tmp_path, 3, 4, lambda volume, k: 4 * volume + k + 1 if volume < 2 or k < 3 else None)
    images, refused, _ = told(tmp_path)
    assert [len(image) for image in images] == [4, 4]
    assert [reason for _, reason in refused] == ["missing-slices"]


@pytest.mark.parametrize("lost", [(0, 0), (1, 0), (1, 2), (0, 3)])
@pytest.mark.parametrize("order", [lambda volume, k: 4 * volume + k + 1, *ORDERS.values()])
def test_a_volume_with_a_lost_slice_is_never_filled_from_the_next(
    tmp_path: Path, order: Any, lost: tuple[int, int]
) -> None:
    time_series(tmp_path, 3, 4, lambda volume, k: None if (volume, k) == lost else order(volume, k))
    images, refused, _ = told(tmp_path)
    assert images == []
    assert [reason for _, reason in refused] == ["duplicate-position"]


def test_a_slice_lost_at_each_place_is_never_filled_from_the_next(tmp_path: Path) -> None:
    time_series(tmp_path, 5, 4, lambda volume, k: None if volume == k else 4 * volume + k + 1)
    assert told(tmp_path)[0] == []


def test_one_place_is_no_volume_however_it_is_numbered(tmp_path: Path) -> None:
    """A series that lost its positions would become an image a slice."""
    write_series(tmp_path, positions=[[0.0, 0.0, 0.0]] * 5, each=[{"InstanceNumber": k + 1} for k in range(5)])
    assert told(tmp_path)[:2] == ([], [("0.dcm", "duplicate-position")])


def test_volumes_of_equal_pixels_are_copies_and_blank_slices_are_not(tmp_path: Path) -> None:
    def write(folder: Path, seeds: Sequence[int]) -> tuple[list[set[str]], list[tuple[str, str]]]:
        for turn, seed in enumerate(seeds):
            slices = noise(4, 4, 6, seed=seed)
            slices[[0, 3]] = 0.0  # slices at the ends that are blank in every volume
            for k, path in enumerate(write_series(folder / "x", slices)):
                made = pydicom.dcmread(path)
                made.InstanceNumber = 10 * turn + k + 1
                made.save_as(folder / f"{turn}-{k}.dcm")
        shutil.rmtree(folder / "x")
        return told(folder)[:2]

    images, refused = write(tmp_path / "all", [0, 1, 2])
    assert [len(image) for image in images] == [4, 4, 4]
    assert refused == []
    images, refused = write(tmp_path / "copy", [0, 1, 0])
    assert images == [{f"{turn}-{k}.dcm" for k in range(4)} for turn in range(2)]
    assert refused == [("2-0.dcm", "duplicate")]


def test_pixels_are_decoded_at_most_once_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusing costs no more than reading: comparing pairs of pixels took an hour for a series of 8,640 files."""
    decoded: Counter[str] = Counter()

    def decode(path: Path) -> np.ndarray[Any, Any]:
        decoded[path.name] += 1
        return decode_frames(path)

    monkeypatch.setattr(pixels, "decode_frames", decode)
    time_series(tmp_path / "told", 12, 4, ORDERS["volume by volume"])
    assert len(told(tmp_path / "told")[0]) == 12
    assert sum(decoded.values()) == 12  # the middle slice of each volume
    decoded.clear()
    time_series(tmp_path / "lost", 12, 4, lambda volume, k: None if (volume, k) == (5, 2) else 100 * volume + k + 1)
    assert told(tmp_path / "lost")[0] == []
    assert set(decoded.values()) == {1}


@pytest.mark.parametrize("count", [12, 40])
def test_slices_of_two_frames_of_reference_are_never_joined(tmp_path: Path, count: int) -> None:
    """Evenly spaced, but a table that moved between the halves: the distance between them is unknown."""
    half = count // 2
    write_series(tmp_path, noise(count, 4, 6), each=[{"FrameOfReferenceUID": f"1.2.{k // half}"} for k in range(count)])
    images, refused, _ = told(tmp_path)
    if count == 12:
        assert (images, refused) == ([], [("0.dcm", "mixed-references")])
    else:
        assert sorted(map(len, images)) == [20, 20]
        assert refused == []


def test_a_slice_of_another_frame_of_reference_is_left_out(tmp_path: Path) -> None:
    write_series(tmp_path, noise(13, 4, 6), each=[{"FrameOfReferenceUID": f"1.2.{k // 12}"} for k in range(13)])
    images, refused, quality = told(tmp_path)
    assert [len(image) for image in images] == [12]
    assert refused == [("12.dcm", "mixed-references")]
    assert quality == [("odd-slices-left-out",)]


def test_slices_of_two_studies_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, each=[{"StudyInstanceUID": f"1.2.{k // 3}"} for k in range(5)])
    assert told(tmp_path)[:2] == ([], [("0.dcm", "mixed-references")])


def test_a_refusal_counts_the_files_of_its_series(tmp_path: Path) -> None:
    write_series(tmp_path, noise(7, 4, 6), positions=[[0.0, 0.0, 0.0]] * 7)
    with pytest.raises(AllRejectedError, match=r"got 7 files without such an image; files: 7 duplicate-position"):
        build_index(tmp_path, "mri", remember=False)


def test_a_copy_under_another_uid_is_refused_alone(tmp_path: Path) -> None:
    slices = noise(4, 4, 6)
    write_series(tmp_path, slices)
    place = {"ImagePositionPatient": [10.0, 20.0, 32.0]}
    save(dataset(slices[1], **place), tmp_path / "copy.dcm")
    images, refused, _ = told(tmp_path)
    assert images == [{"0.dcm", "1.dcm", "2.dcm", "3.dcm"}]
    assert refused == [("copy.dcm", "duplicate")]
    save(dataset(slices[2], **place), tmp_path / "copy.dcm")
    assert told(tmp_path)[:2] == ([], [("0.dcm", "duplicate-position")])


def test_the_same_pixels_of_another_echo_are_no_copy(tmp_path: Path) -> None:
    slices = noise(4, 4, 6)
    write_series(tmp_path, slices)
    for number in (1, 2):  # the second echo lost its other slices; one that lies elsewhere must not join the first's
        place = {"ImagePositionPatient": [10.0, 20.0, 30.0 + 2 * number]}
        save(dataset(slices[number], EchoNumbers=number, **place), tmp_path / f"echo-{number}.dcm")
    assert told(tmp_path)[:2] == ([], [("0.dcm", "duplicate-position")])


@pytest.mark.parametrize(
    ("reason", "tags"),
    [
        ("odd-orientation", {"ImageOrientationPatient": list(SAGITTAL)}),
        ("odd-spacing", {"PixelSpacing": [2.0, 2.0]}),
        ("no-geometry", {"ImagePositionPatient": None}),
    ],
)
def test_a_few_odd_slices_are_refused_and_the_stack_stays(tmp_path: Path, reason: str, tags: dict[str, Any]) -> None:
    write_series(tmp_path, noise(12, 4, 6))
    save(dataset(noise(4, 6), **tags), tmp_path / "odd.dcm")
    images, refused, quality = told(tmp_path)
    assert [len(image) for image in images] == [12]
    assert refused == [("odd.dcm", reason)]
    assert quality == [("odd-slices-left-out",)]


def test_an_odd_slice_of_another_size_is_refused_alone(tmp_path: Path) -> None:
    write_series(tmp_path, noise(12, 4, 6))
    save(dataset(noise(8, 8)), tmp_path / "odd.dcm")
    assert told(tmp_path)[1] == [("odd.dcm", "odd-size")]


def test_a_scout_in_three_planes_is_refused_and_two_whole_stacks_are_two_images(tmp_path: Path) -> None:
    for name, orientation in ORIENTATIONS.items():
        for path in write_series(tmp_path / name, noise(5, 4, 6), ImageOrientationPatient=list(orientation)):
            path.rename(tmp_path / f"{name}{path.name}")
        (tmp_path / name).rmdir()
    assert told(tmp_path)[:2] == ([], [("axial0.dcm", "mixed-orientation")])
    whole = tmp_path.with_name("whole")
    for name in ("axial", "sagittal"):
        orientation = list(ORIENTATIONS[name])
        for path in write_series(whole / name, noise(10, 4, 6), ImageOrientationPatient=orientation):
            path.rename(whole / f"{name}{path.name}")
        (whole / name).rmdir()
    images, refused, _ = told(whole)
    assert sorted(map(len, images)) == [10, 10]
    assert refused == []


def test_descriptions_decide_nothing(tmp_path: Path) -> None:
    write_series(
        tmp_path,
        StudyDescription="LOCALIZER SCREEN SAVE SCOUT",
        SeriesDescription="3-plane localizer, MOSAIC, do not use",
        ProtocolName="CT SCOUT",
        each=[{"SeriesDescription": f"echo {k}"} for k in range(5)],
    )
    assert [len(image) for image in told(tmp_path)[0]] == [5]


def test_slices_may_lie_a_tenth_of_a_millimetre_off(tmp_path: Path) -> None:
    places = [[0.0, 5.0, z] for z in (0.0, 2.05, 4.0, 5.93, 8.0)]
    write_series(tmp_path, positions=places)
    assert [len(image) for image in told(tmp_path)[0]] == [5]
    write_series(tmp_path, positions=[[0.0, 5.0, z] for z in (0.0, 2.2, 4.0, 6.0, 8.0)])
    assert told(tmp_path)[1] == [("0.dcm", "uneven-gaps")]
    write_series(tmp_path, positions=[[0.0, 5.0, 0.3 * z] for z in (0.0, 1.2, 2.0, 3.0, 4.0)])
    assert told(tmp_path)[1] == [("0.dcm", "uneven-gaps")]


def test_the_refusal_of_a_series_says_how_many_files_it_has(tmp_path: Path) -> None:
    write_series(tmp_path, positions=[[0, 0, z] for z in (0.0, 2.0, 6.0, 8.0, 14.0)])
    (refused,) = scan(DICOM, sorted(tmp_path.iterdir()), "mri")[1]
    assert refused.reason == "missing-slices"
    assert refused.detail == "3 of 8 slices 2.000 mm apart are missing (series of 5 files)"


def test_what_lost_its_place_says_so(tmp_path: Path) -> None:
    write_series(tmp_path, noise(3, 4, 6), ImagePositionPatient=(0.0, 0.0, 1.0))
    assert told(tmp_path)[2] == [("no-place",)]
    save(dataset(noise(4, 6), ImagePositionPatient=[1.0, 2.0, 3.0]), tmp_path.with_name("one") / "a.dcm")
    assert told(tmp_path.with_name("one"))[2] == [("single-slice",)]


# --- random folders against a slow reference


@st.composite
def series(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Tags of the slices of one series, in any order; `pixels` and `name` beside them."""
    count = draw(st.integers(1, 6) | st.integers(10, 13))
    orientation = draw(st.sampled_from(sorted(ORIENTATIONS)))
    axes = np.array(ORIENTATIONS[orientation])
    normal = np.cross(axes[:3], axes[3:])
    origin = np.array(draw(st.tuples(*[st.integers(-90, 90)] * 3)), float) + np.array([0.25, 0.5, 0.125])
    gap = draw(st.sampled_from([0.6, 1.0, 3.3]))
    depths = gap * np.arange(count)
    what = draw(st.sampled_from(["good", "good", "missing", "uneven", "odd", "copy", "conflict"]))
    if what in {"missing", "uneven"}:
        depths[draw(st.integers(0, count - 1)) :] += gap * (2 if what == "missing" else 0.37)
    size, spacing = draw(st.sampled_from([(2, 3), (3, 2)])), draw(st.sampled_from([[0.5, 0.8], [1.0, 1.0]]))
    turns = draw(st.integers(1, 3)) if what in {"good", "missing", "uneven"} else 1
    tag = draw(st.sampled_from([*KEYS, "InstanceNumber"]))
    running = draw(st.booleans())  # AcquisitionNumber counts the files, or the slices
    slices: list[dict[str, Any]] = []
    for turn in range(turns):
        for k, depth in enumerate(depths):
            shaken = axes + draw(st.sampled_from([0.0, 1e-7, -1e-7, 1e-5]))
            place = {"ImagePositionPatient": list(origin + normal * depth), "ImageOrientationPatient": list(shaken)}
            own = {
                "AcquisitionNumber": len(slices) if running else k,
                tag: turn + 1,
                "PixelSpacing": spacing,
                "size": size,
            }
            slices.append({**place, **own, "SOPInstanceUID": generate_uid()})
    if what == "odd":
        other = draw(st.sampled_from([{"ImageOrientationPatient": [0.0, 1.0, 0, -1.0, 0, 0]}, {"size": (4, 4)}]))
        slices.append({**slices[0], "SOPInstanceUID": generate_uid(), **other})
    if what in {"copy", "conflict"}:
        uid = draw(st.booleans())
        again = {"SOPInstanceUID": slices[0]["SOPInstanceUID"] if uid else generate_uid(), "of": 0}
        slices.append({**slices[0], **(again if what == "copy" else again | {"of": None})})
    series_uid = generate_uid()
    return [{**one, "SeriesInstanceUID": series_uid, "seed": draw(st.integers(0, 2**31))} for one in slices]


def pixels_of(slices: list[dict[str, Any]], one: dict[str, Any]) -> np.ndarray[Any, Any]:
    copied = one.get("of") is not None
    first = next(s for s in slices if s["SeriesInstanceUID"] == one["SeriesInstanceUID"]) if copied else one
    return noise(*first["size"], seed=first["seed"])


def reference(slices: list[dict[str, Any]]) -> tuple[list[set[str]], list[tuple[str, str]]]:
    """What the builder should say, by looking at everything, slice by slice, in the plainest way."""
    images: list[set[str]] = []
    refused: list[tuple[str, str]] = []
    kept: dict[str, dict[str, Any]] = {}
    for one in sorted(slices, key=lambda one: one["name"]):
        first = kept.setdefault(one["SOPInstanceUID"], one)
        if first is not one:
            same = np.array_equal(first["pixels"], one["pixels"])
            refused.append((one["name"], "duplicate" if same else "conflicting-duplicate"))
    by_series: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in kept.values():
        by_series[one["SeriesInstanceUID"]].append(one)
    for members in by_series.values():
        planes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for one in members:
            planes[tuple(np.round(one["ImageOrientationPatient"], 2) + 0.0), one["size"]].append(one)
        whole = [plane for plane in planes.values() if len(plane) >= 10] if len(planes) > 1 else list(planes.values())
        odd = [one for plane in planes.values() if plane not in whole for one in plane]
        differ = "orientation" if len({key[0] for key in planes}) > 1 else "size"
        if not whole or 10 * len(odd) >= len(members):
            refused.append((members[0]["name"], f"mixed-{differ}"))
            continue
        refused += [(one["name"], f"odd-{differ}") for one in odd]
        for plane in whole:
            parts = split(plane, refused)
            for part in parts:
                reason = "duplicate-position" if repeats(part) > 1 else uneven(part)
                names = {one["name"] for one in part}
                if reason:
                    refused.append((min(names), reason))
                else:
                    images.append(names)
    return sorted(images, key=sorted), sorted(refused)


def place_of(one: dict[str, Any]) -> tuple[float, ...]:
    return tuple(np.round(one["ImagePositionPatient"], 3))


def repeats(part: list[dict[str, Any]]) -> int:
    return max(Counter(place_of(one) for one in part).values())


def split(plane: list[dict[str, Any]], refused: list[tuple[str, str]]) -> list[list[dict[str, Any]]]:
    for _ in range(2):
        if repeats(plane) == 1:
            return [plane]
        for key in KEYS:
            parts: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for one in plane:
                parts[one.get(key)].append(one)
            if len(parts) == repeats(plane) and all(repeats(part) == 1 for part in parts.values()):
                return list(parts.values())
        if turns := by_order(plane):
            return turns
        left: list[dict[str, Any]] = []
        for one in plane:
            if any(alike(one, o) for o in left):
                refused.append((one["name"], "duplicate"))
            else:
                left.append(one)
        plane = left
    return [plane]


def by_order(plane: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The k-th number at each place, where each has as many; echoes and the like apart if every place has them."""
    places: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for one in sorted(plane, key=lambda one: one.get("InstanceNumber", 0)):
        places[place_of(one)].append(one)
    numbers = [[one.get("InstanceNumber", 0) for one in place] for place in places.values()]
    clear = all(0 not in place and len(set(place)) == len(place) for place in numbers)
    if len(places) == 1 or not clear or len({len(place) for place in numbers}) > 1:
        return []
    return [list(turn) for turn in zip(*places.values(), strict=True)]


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    said = [[each.get(key) for key in KEYS] for each in (one, other)]
    return said[0] == said[1] and place_of(one) == place_of(other) and np.array_equal(one["pixels"], other["pixels"])


def uneven(part: list[dict[str, Any]]) -> str:
    axes = np.array(part[0]["ImageOrientationPatient"])
    depths = sorted(float(np.cross(axes[:3], axes[3:]) @ one["ImagePositionPatient"]) for one in part)
    gaps = np.diff(depths)
    if len(gaps) == 0 or gaps.max() - gaps.min() < 0.01:
        return ""
    multiples = gaps / gaps.min()
    return "missing-slices" if np.abs(multiples - np.rint(multiples)).max() < 0.02 else "uneven-gaps"


def lies_right(folder: Path, names: set[str], slices: list[dict[str, Any]]) -> None:
    """Every voxel of an image holds the pixel that lies at its place in the patient."""
    volume = DICOM.read_files([folder / name for name in sorted(names)])
    points, values = [], []
    for one in (one for one in slices if one["name"] in names):
        row, column = np.array(one["ImageOrientationPatient"]).reshape(2, 3)
        for (down, right), value in np.ndenumerate(one["pixels"]):
            dy, dx = one["PixelSpacing"]
            points.append(np.array(one["ImagePositionPatient"]) + right * dx * row + down * dy * column)
            values.append(value)
    lps = np.array(points) * [-1, -1, 1]
    index = np.indices(volume.shape).reshape(3, -1)
    ours = (volume.affine[:3, :3] @ index + volume.affine[:3, 3:]).T
    away = np.linalg.norm(ours[:, None] - lps[None], axis=2)
    assert away.min(axis=1).max() < 1e-3
    assert sorted(away.argmin(axis=1)) == list(range(len(values)))
    np.testing.assert_array_equal(volume.array.ravel(), np.array(values)[away.argmin(axis=1)])
    turn = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(turn.T @ turn, np.eye(3), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(drawn=st.lists(series(), min_size=1, max_size=2), shuffle=st.randoms(use_true_random=False))
def test_random_folders_are_sorted_as_a_slow_reference_does(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[dict[str, Any]]], shuffle: Any
) -> None:
    slices = [one for each in drawn for one in each]
    shuffle.shuffle(slices)
    for number, one in enumerate(slices):
        one["name"] = f"{number:03d}.dcm"
    folder = tmp_path_factory.mktemp("random")
    for one in slices:
        one["pixels"] = pixels_of([s for each in drawn for s in each], one)
        tags = {name: value for name, value in one.items() if name[0].isupper()}
        dataset(one["pixels"], **tags).save_as(folder / one["name"], enforce_file_format=True)
    images, refused, _ = told(folder)
    assert (sorted(images, key=sorted), refused) == reference(slices)
    for names in images[:1]:
        lies_right(folder, names, slices)
    shutil.rmtree(folder)
