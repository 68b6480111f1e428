"""Arrays of a package: read without pickle, and without room for what a header only claims."""

from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest

from medim.inference import arrays
from medim.inference.arrays import read_npz_arrays


def packed(**entries: bytes) -> bytes:
    """A zip file of arrays as raw bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f4'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_arrays_come_back_as_they_were_packed() -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=np.arange(6, dtype=np.int16).reshape(2, 3), b=np.asarray("conformal"))
    found = read_npz_arrays(buffer.getvalue())
    np.testing.assert_array_equal(found["a"], [[0, 1, 2], [3, 4, 5]])
    assert str(found["b"]) == "conformal"


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('it was unpickled')",)


def test_a_pickle_in_place_of_numbers_is_refused_and_not_run() -> None:
    evil = header("(1,)", "'|O'") + pickle.dumps([Bomb()])
    with pytest.raises(ValueError, match="objects"):
        read_npz_arrays(packed(image=evil))
    with pytest.raises(ValueError, match="not an"):
        read_npz_arrays(pickle.dumps(Bomb()))


@pytest.mark.parametrize("descr", ["'<U0'", "'|S0'", "'|V0'", "'<M8[s]'"])
def test_what_holds_no_numbers_is_refused_before_room_is_made(descr: str) -> None:
    with pytest.raises(ValueError, match="in place of numbers"):
        read_npz_arrays(packed(image=header("(1000000000000,)", descr)))


def test_a_header_that_is_no_python_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not an|annot"):
        read_npz_arrays(packed(image=b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + b"(" * 117 + b"\n"))


@pytest.mark.parametrize("shape", ["(1000000, 1000000)", "(2,)", "(-1, 4)"])
def test_a_header_that_claims_other_bytes_than_there_are_is_refused_before_room_is_made(shape: str) -> None:
    with pytest.raises(ValueError, match="array of shape"):
        read_npz_arrays(packed(image=header(shape) + bytes(4)))


def test_a_header_of_megabytes_is_refused() -> None:
    text = b"{" + b" " * 60000 + b"}\n"
    with pytest.raises(ValueError, match=r"[Hh]eader"):
        read_npz_arrays(packed(image=b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text))


def test_a_small_file_that_holds_gigabytes_is_refused_unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = packed(image=header("(4194304,)") + bytes(1 << 24))
    assert len(zeros) < 20000
    assert read_npz_arrays(zeros)["image"].nbytes == 1 << 24
    monkeypatch.setattr(arrays, "MAX_ARRAY_BYTES", 1 << 24)
    with pytest.raises(ValueError, match="of arrays"):
        read_npz_arrays(zeros)
