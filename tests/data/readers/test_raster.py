"""Pictures and numpy arrays."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from medim.data.index.index import build_index
from medim.data.readers import ReadError, raster, read_mask, read_volume
from medim.data.readers.raster import NumpyReader, PictureReader
from tests.data.synthetic import noise, write_archive


def reason_of(path: Path | str) -> str:
    with pytest.raises(ReadError) as caught:
        read_volume(path)
    return caught.value.reason


def test_a_grey_picture_is_rows_by_columns(tmp_path: Path) -> None:
    pixels = noise(4, 6).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    volume = read_volume(tmp_path / "a.png")
    np.testing.assert_array_equal(volume.array, pixels[None].astype(np.float32))
    assert volume.native_shape == (4, 6)
    np.testing.assert_array_equal(volume.affine, np.eye(4))


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    pixels = (noise(4, 6) * 60).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.png").array[0], pixels)


def test_colour_becomes_luminance(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:, :3, 0], pixels[:, 3:, 1] = 200, 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_volume(tmp_path / "a.png").array[0, 0, ::5] == pytest.approx([59.8, 117.4], abs=1)


def test_a_jpeg_is_read_and_a_truncated_one_refused(tmp_path: Path) -> None:
    Image.fromarray(noise(64, 64).astype(np.uint8)).save(tmp_path / "a.jpg")
    assert read_volume(tmp_path / "a.jpg").shape == (64, 64)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    assert reason_of(tmp_path / "a.jpg") == "unreadable"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read_and_colour_is_told(tmp_path: Path, mode: str) -> None:
    grey = (noise(8, 9) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(grey).convert(mode if mode != "I;16" else "L")
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    quality = PictureReader().inspect(path).images[0].quality
    assert quality == (("no-spacing",) if mode in {"1", "L", "I;16"} else ("no-spacing", "colour-to-grey"))
    pixels = read_volume(path).array[0]
    np.testing.assert_allclose(pixels / pixels.max(), grey / 255, atol=0.01)


@pytest.mark.parametrize("mode", ["L", "P", "PA", "RGB", "RGBA"])
def test_a_mask_is_read_as_class_numbers_whatever_the_colours_of_its_palette(tmp_path: Path, mode: str) -> None:
    classes = np.array([[0, 1, 2], [2, 0, 1]], np.uint8)
    image = Image.fromarray(classes)
    if mode.startswith("P"):
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.convert(mode).save(tmp_path / ("a.tif" if mode == "PA" else "a.png"))
    np.testing.assert_array_equal(read_mask(next(tmp_path.iterdir())).array[0], classes)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_mask_in_colours_without_a_palette_is_refused(tmp_path: Path, mode: str) -> None:
    colours = np.zeros((2, 3, len(mode)), np.uint8)
    colours[..., 1] = 255
    Image.fromarray(colours, mode).save(tmp_path / "a.tif")
    with pytest.raises(ReadError, match="an image in colour") as error:
        read_mask(tmp_path / "a.tif")
    assert error.value.reason == "not-a-mask"


def test_a_picture_is_turned_as_its_exif_says_and_its_print_resolution_is_not_used(tmp_path: Path) -> None:
    pixels = (noise(4, 6) % 256).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the camera was held on its side
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif, dpi=(300, 300))
    volume = read_volume(tmp_path / "a.png")
    np.testing.assert_array_equal(volume.array[0], np.rot90(pixels, -1))
    assert volume.spacing == (1.0, 1.0)
    assert PictureReader().inspect(tmp_path / "a.png").images[0].quality == ("no-spacing", "exif-turned")


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("turn", [1, 3, 5, 6, 8])
def test_an_uncompressed_tiff_is_turned_as_it_says(tmp_path: Path, turn: int, kind: type) -> None:
    pixels = (noise(4, 6) % 256).astype(kind)
    Image.fromarray(pixels).save(tmp_path / "a.tiff", exif={ExifTags.Base.Orientation: turn})
    turned = {1: pixels, 3: np.rot90(pixels, 2), 5: pixels.T, 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}[turn]
    np.testing.assert_array_equal(read_volume(tmp_path / "a.tiff").array[0], turned)


@pytest.mark.parametrize("factor", [2, 4])  # Pillow warns of the one and refuses the other
def test_a_decompression_bomb_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: int) -> None:
    Image.fromarray(noise(10, 10).astype(np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 // factor)
    assert reason_of(tmp_path / "a.png") == "too-large"


def test_an_animation_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(4, 6, seed=k).astype(np.uint8)) for k in range(2)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert reason_of(tmp_path / "a.png") == "several-volumes"


def test_an_archive_may_hold_volumes_colour_and_several_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.savez(tmp_path / "v.npz", train_images=noise(3, 5, 6, 7))
    assert read_volume(f"{tmp_path / 'v.npz'}#train/1").shape == (5, 6, 7)
    assert NumpyReader().inspect(tmp_path / "v.npz").images[0].quality == ("no-spacing", "no-place")
    (tmp_path / "s").mkdir()
    np.savez(tmp_path / "s" / "c.npz", val_images=noise(3, 5, 6, 3), val_labels=np.full((3, 14), 2))
    index = build_index(tmp_path / "s", "xray")
    assert [(r.label, r.shape) for r in index.records] == [(None, (5, 6))] * 3
    assert (index.records[0].quality or "").split() == ["no-spacing", "several-labels"]
    assert "3 images have multi-valued labels" in caplog.text


def test_an_archive_that_would_unpack_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_archive(tmp_path / "x.npz")
    monkeypatch.setattr(raster, "_MAX_ARCHIVE_BYTES", 100)
    assert reason_of(f"{path}#0") == "too-large"


def test_an_archive_of_too_many_images_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_archive(tmp_path / "x.npz")
    monkeypatch.setattr(raster, "_MAX_ARCHIVE_IMAGES", 8)
    monkeypatch.setattr(np, "load", None)
    assert reason_of(f"{path}#0") == "too-many-images"


def test_several_frames_are_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(4, 6, seed=k).astype(np.uint8)) for k in range(2)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert reason_of(tmp_path / "a.tif") == "several-volumes"


def test_an_array_is_2d_or_3d(tmp_path: Path) -> None:
    for shape in ((4, 6), (4, 5, 6)):
        array = noise(*shape)
        np.save(tmp_path / "a.npy", array)
        np.testing.assert_array_equal(read_volume(tmp_path / "a.npy").array[0], array)
    np.save(tmp_path / "b.npy", noise(2, 3, 4, 5))
    assert reason_of(tmp_path / "b.npy") == "wrong-dimensions"


class Bomb:
    """Would make a file if it were ever unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_nothing_is_ever_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    bomb = np.array([Bomb()], dtype=object)
    if name == "a.npy":
        np.save(tmp_path / name, bomb, allow_pickle=True)
    else:
        np.savez(tmp_path / name, train_images=bomb)
    assert reason_of(tmp_path / name if name == "a.npy" else f"{tmp_path / name}#0") == "unreadable"
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    assert reason_of(tmp_path / "b.npy") == "unreadable"
    assert not (tmp_path / "unpickled").exists()


def test_an_image_of_an_archive_is_named_by_split_or_by_number(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.npz")
    images = np.load(path)
    np.testing.assert_array_equal(read_volume(f"{path}#train/5").array[0], images["train_images"][5])
    np.testing.assert_array_equal(read_volume(f"{path}#val/1").array[0], images["val_images"][1])
    np.testing.assert_array_equal(read_volume(f"{path}#7").array[0], images["val_images"][1])


@pytest.mark.parametrize("item", ["train/6", "test/0", "9", "-1", "train/-1", "", "train/x"])
def test_an_image_that_an_archive_lacks_is_an_error_that_lists_what_it_has(tmp_path: Path, item: str) -> None:
    path = write_archive(tmp_path / "x.npz")
    with pytest.raises(ReadError, match=r"train/0\.\.5, val/0\.\.2"):
        read_volume(f"{path}#{item}")


def test_an_archive_without_an_item_is_no_volume(tmp_path: Path) -> None:
    assert reason_of(write_archive(tmp_path / "x.npz")) == "several-volumes"


def test_an_archive_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.npz")
    before = read_volume(f"{path}#0").array
    np.savez(path, train_images=noise(2, 9, 9))
    assert read_volume(f"{path}#0").array.shape != before.shape


def test_archives_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", weights=noise(4))
    assert reason_of(f"{tmp_path / 'a.npz'}#0") == "unknown-layout"
    (tmp_path / "b.npz").write_bytes(b"no zip file")
    assert reason_of(f"{tmp_path / 'b.npz'}#0") == "unreadable"
    buffer = io.BytesIO()
    np.savez(buffer, train_images=noise(2, 4, 4), train_labels=np.zeros((3, 1)))
    (tmp_path / "c.npz").write_bytes(buffer.getvalue())
    assert reason_of(f"{tmp_path / 'c.npz'}#0") == "unknown-layout"
