"""Decoding in a process of its own: the same pixels, and a hostile file costs itself alone."""

from __future__ import annotations

import csv
import os
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from medim.data.readers import DICOM, ReadError
from medim.data.readers.dicom.pixels import decode_frames
from medim.data.readers.dicom.sandbox import DecoderProcess, DecodingLimits, sandboxed_decoding
from medim.inference.network import Predictor
from medim.predict.predict import predict
from medim.types import Array
from tests.data.synthetic import dataset, noise, save, write_series

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


def test_a_decoder_that_hangs_is_stopped_and_the_next_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.dcm")  # nobody ever writes to it
    pixels = noise(4, 6)
    good = save(dataset(pixels), tmp_path / "good.dcm")
    apart = DecoderProcess(replace(LIMITS, seconds=1.0))
    try:
        with pytest.raises(ReadError) as raised:
            apart(tmp_path / "endless.dcm")
        assert raised.value.reason == "too-slow"
        np.testing.assert_array_equal(apart(good)[0], pixels)
    finally:
        apart.close()


def test_a_process_that_dies_costs_the_file_it_read_and_no_other(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.dcm")
    pixels = noise(4, 6)
    good = save(dataset(pixels), tmp_path / "good.dcm")
    apart = DecoderProcess(LIMITS)
    try:
        apart(good)
        assert apart._process is not None
        killer = threading.Timer(0.5, apart._process.kill)
        killer.start()
        with pytest.raises(ReadError) as raised:
            apart(tmp_path / "endless.dcm")
        assert raised.value.reason == "worker-died"
        np.testing.assert_array_equal(apart(good)[0], pixels)
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
