"""Decoding in a process of its own: the same pixels, and a hostile file costs itself alone."""

from __future__ import annotations

import csv
import os
import resource
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medim.data.index.scan_cache import inspect_file
from medim.data.readers import DICOM, READERS, ReadError, find_reader, read_mask, read_volume, sandbox
from medim.data.readers.base import DECODER, flat_volume
from medim.data.readers.dicom.pixels import decode_frames
from medim.data.readers.inspection import INSPECTION_ADAPTER
from medim.data.readers.raster import NumpyReader
from medim.data.readers.sandbox import DecoderProcess, DecodingLimits, sandboxed_decoding
from medim.inference.network import Predictor
from medim.predict.predict import predict
from medim.types import Array, Volume
from tests.contracts.samples import SAMPLES
from tests.data.synthetic import dataset, noise, save, write_nifti, write_series

LIMITS = DecodingLimits()
FORMATS = ("JPEG-LL", "MR2_J2KI", "RG3_J2KI", "emri_small", "emri_small_jpeg_ls_lossless", "OBXXXX1A_rle")


def test_pixels_decoded_apart_are_those_decoded_here(shared_data: Path) -> None:
    files = [shared_data / "dicom-formats" / f"{name}.dcm" for name in FORMATS]
    here = [decoded(path) for path in files]
    with sandboxed_decoding(LIMITS):
        there = [decoded(path) for path in files]
    assert sum(isinstance(one, np.ndarray) for one in here) >= 4
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one, other)


def decoded(path: Path) -> Any:
    """Pixels, or the code by which they are refused."""
    try:
        return decode_frames(path)
    except ReadError as error:
        return error.reason


def test_every_format_decoded_apart_is_that_decoded_here(tmp_path: Path) -> None:
    """Images, masks, inspections and refusals are the same, bit for bit."""
    files = [write(tmp_path / name) for samples in SAMPLES.values() for name, _, write in samples]
    for name in ("a.nii", "a.png", "a.npy"):
        files.append(tmp_path / f"cut-{name}")
        files[-1].write_bytes((tmp_path / name).read_bytes()[:50])
    Image.fromarray(np.array([[0, 1, 2], [2, 0, 1]], np.uint8)).save(tmp_path / "classes.png")
    files.append(tmp_path / "classes.png")
    here = [read_all(path) for path in files]
    with sandboxed_decoding(LIMITS):
        there = [read_all(path) for path in files]
    assert here == there
    assert sum(isinstance(one[0], tuple) for one in here) == len(files) - 3
    assert isinstance(here[-1][1], tuple)


def read_all(path: Path) -> list[Any]:
    """The image, the mask and the inspection of a file, or the codes by which they are refused."""
    reader = find_reader(path)
    assert reader is not None
    results: list[Any] = []
    for read in (read_volume, read_mask):
        try:
            volume = read(f"{path}#train/0" if path.suffix == ".npz" else path)
            arrays = (volume.array, volume.affine, volume.native_affine)
            results.append((volume.shape, volume.native_shape, *((str(a.dtype), a.tobytes()) for a in arrays)))
        except ReadError as error:
            results.append(str(error))
    inspection = inspect_file(reader.inspect, path)
    return [*results, INSPECTION_ADAPTER.dump_json(inspection)]


def test_a_reader_that_a_script_inserts_reads_in_the_process_of_the_script(tmp_path: Path) -> None:
    class CsvReader(NumpyReader):
        name = "csv"

        def accepts(self, path: Path) -> bool:
            return path.suffix == ".csv"

        def read(self, path: Path, item: str | None = None) -> Volume:
            return flat_volume(np.loadtxt(path, np.float32, delimiter=","))

    np.savetxt(tmp_path / "a.csv", noise(4, 6), delimiter=",")
    READERS.insert(0, CsvReader())
    try:
        with sandboxed_decoding(LIMITS):
            assert read_volume(tmp_path / "a.csv").shape == (4, 6)
    finally:
        del READERS[0]


def test_a_block_inside_another_uses_its_process_unless_the_limits_differ(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii", noise(4, 5, 6))
    with sandboxed_decoding(LIMITS):
        outer = DECODER.get()
        assert isinstance(outer, DecoderProcess)
        read_volume(path)
        process = outer._process
        with sandboxed_decoding(LIMITS):
            read_volume(path)
            assert DECODER.get() is outer
        assert outer._process is process is not None
        with sandboxed_decoding(replace(LIMITS, voxels=119)), pytest.raises(ReadError, match=r"\[too-large\]"):
            read_volume(path)
        assert DECODER.get() is outer
    assert DECODER.get() is None


def test_no_memory_for_a_reply_ends_the_process_and_the_next_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_nifti(tmp_path / "a.nii", noise(4, 5, 6))
    apart = DecoderProcess(LIMITS)

    def allocate(*_: Any) -> Any:
        monkeypatch.undo()
        raise MemoryError

    try:
        first = apart.read(path, None)
        monkeypatch.setattr(np, "empty", allocate)
        with pytest.raises(MemoryError):
            apart.read(path, None)
        np.testing.assert_array_equal(apart.read(path, None).array, first.array)
    finally:
        apart.close()


def test_the_process_takes_no_more_than_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: dict[int, int] = {}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda number, pair: limits.update({number: pair[0]}))
    monkeypatch.setattr(sandbox, "allocated_address_space", lambda: 1 << 30)
    for free, expected in ((1 << 29, 3 << 29), (1 << 40, LIMITS.memory)):
        monkeypatch.setattr(sandbox, "available_memory", lambda free=free: free)
        sandbox._set_resource_limits(LIMITS.memory)
        assert limits == {resource.RLIMIT_AS: expected, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}


def test_a_decoder_that_hangs_is_stopped_and_the_next_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.dcm")  # nobody ever writes to it
    pixels = noise(4, 6)
    good = save(dataset(pixels), tmp_path / "good.dcm")
    apart = DecoderProcess(replace(LIMITS, seconds=1.0))
    try:
        with pytest.raises(ReadError) as raised:
            apart.decode_frames(tmp_path / "endless.dcm")
        assert raised.value.reason == "too-slow"
        np.testing.assert_array_equal(apart.decode_frames(good)[0], pixels)
    finally:
        apart.close()


def test_a_process_that_dies_costs_the_file_it_read_and_no_other(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.dcm")
    pixels = noise(4, 6)
    good = save(dataset(pixels), tmp_path / "good.dcm")
    apart = DecoderProcess(LIMITS)
    try:
        apart.decode_frames(good)
        assert apart._process is not None
        killer = threading.Timer(0.5, apart._process.kill)
        killer.start()
        with pytest.raises(ReadError) as raised:
            apart.decode_frames(tmp_path / "endless.dcm")
        assert raised.value.reason == "worker-died"
        np.testing.assert_array_equal(apart.decode_frames(good)[0], pixels)
    finally:
        apart.close()


def bomb(path: Path, gib: int) -> Path:
    """A small deflated DICOM file whose trailing padding is so many GiB of zeros."""
    made = dataset(noise(4, 6).astype(np.uint16))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    plain = save(made, path.with_suffix(".plain")).read_bytes()
    length = gib << 30
    # meta information stays as it is; the data set is inflated, lengthened and deflated again
    start = 144 + int.from_bytes(plain[140:144], "little")
    inner = zlib.decompressobj(-zlib.MAX_WBITS).decompress(plain[start:])
    head = inner + b"\xfc\xff\xfc\xffOB\0\0" + length.to_bytes(4, "little")
    press = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    begun = press.compress(head) + press.flush(zlib.Z_FULL_FLUSH)
    block = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    zeros = block.compress(bytes(1 << 24)) + block.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(plain[:start] + begun + zeros * (length >> 24) + b"\x03\0")
    path.with_suffix(".plain").unlink()
    return path


def test_a_decompression_bomb_costs_one_file_and_no_memory_of_ours(tmp_path: Path) -> None:
    path = bomb(tmp_path / "bomb.dcm", 2)
    assert path.stat().st_size < 6e6
    assert DICOM.inspect(path).instance is not None  # its header is that of a small slice
    with sandboxed_decoding(replace(LIMITS, memory=3 << 29)), pytest.raises(ReadError) as raised:
        decode_frames(path)
    assert raised.value.reason == "too-much-memory"


def test_what_a_file_decodes_to_is_held_against_the_limit_too(tmp_path: Path) -> None:
    path = save(dataset(noise(8, 8)), tmp_path / "a.dcm")
    with sandboxed_decoding(replace(LIMITS, voxels=63)), pytest.raises(ReadError) as raised:
        decode_frames(path)
    assert raised.value.reason == "too-large"


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (replace(LIMITS, files=4), "too-many-files"),
        (replace(LIMITS, voxels=5 * 4 * 6 - 1), "too-large"),
        (replace(LIMITS, file_bytes=100), "too-large"),
    ],
)
def test_what_the_headers_announce_is_held_against_the_limits(
    tmp_path: Path, limits: DecodingLimits, reason: str
) -> None:
    plan = DICOM.plan_slices(write_series(tmp_path, noise(5, 4, 6).astype(np.uint16)))
    LIMITS.check_plan(plan)
    with pytest.raises(ReadError) as raised:
        limits.check_plan(plan)
    assert raised.value.reason == reason


def _bright(image: Array) -> Array:
    return np.concatenate([0.5 - image, image - 0.5], axis=1)


def test_predict_rejects_what_breaks_a_limit_and_answers_the_rest(tmp_path: Path) -> None:
    steps = ({"op": "ras"}, {"op": "normalise", "method": "range"})
    network = Predictor(
        run=_bright,
        kind="segmenter",
        modality="mri",
        spatial_dims=3,
        in_channels=1,
        classes=("bright",),
        preprocessing=steps,
        inference={"mode": "whole", "multiple_of": 4},
    )
    write_series(tmp_path / "in" / "a", noise(5, 4, 6).astype(np.uint16))
    write_series(tmp_path / "in" / "b", noise(5, 8, 9).astype(np.uint16), SeriesInstanceUID="1.2.3")
    rows = predict(network, tmp_path / "in", tmp_path / "out", limits=replace(LIMITS, voxels=200))
    assert len(rows) == 1
    with (tmp_path / "out" / "rejected.csv").open(newline="") as file:
        assert [row["reason"] for row in csv.DictReader(file)] == ["too-large"]
