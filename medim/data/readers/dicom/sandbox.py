"""Decode DICOM pixels in a process of their own, within limits: what hangs, or eats memory, costs one file.

The process has a limit on its memory and writes no file; each file has a limit on its time. What comes back is a line
of JSON and plain numbers: nothing is unpickled that a decoder has touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from medim.data.readers.base import ReadError
from medim.data.readers.dicom.pixels import DECODER, frames_of
from medim.types import Array

_STARTS = 60.0  # seconds that the process may take to start
_PACKAGE = Path(__file__).resolve().parents[4]
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from medim.data.readers.dicom import sandbox; sandbox.serve(sys.argv[2])"
)


class Sliced(Protocol):
    """What `dicom.Plan` says of an image."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Each file once."""
        ...

    @property
    def slices(self) -> tuple[tuple[Path, int], ...]:
        """File and frame of each slice."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """Rows, columns."""
        ...


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes:
        files: of a series.
        read: bytes of all its files.
        voxels: rows x columns x frames of the image, as the headers announce them.
        seconds: of the decoding of one file.
        memory: bytes of address space of the process that decodes.
    """

    files: int = 10_000
    read: int = 8 << 30
    voxels: int = 1 << 29
    seconds: float = 60.0
    memory: int = 6 << 30

    def check(self, plan: Sliced) -> None:
        """Hold an image's headers against the limits, before any pixel is decoded.

        Raises:
            ReadError: there is too much of it.
        """
        if len(plan.files) > self.files:
            raise ReadError("too-many-files", f"a series of {len(plan.files)} files; at most {self.files} are read")
        size = sum(path.stat().st_size for path in plan.files)
        voxels = len(plan.slices) * plan.size[0] * plan.size[1]
        if size > self.read or voxels > self.voxels:
            most = f"at most {self.read / 2**30:.3g} GiB and {self.voxels:,} are decoded"
            raise ReadError("too-large", f"{size / 2**30:.3g} GiB of files, {voxels:,} voxels; {most}")


class Apart:
    """Decodes files in one process, which starts with the first file and again after each that it did not survive.

    Args:
        limits: of each file.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, path: Path) -> Array:
        """See `dicom_pixels.frames_of`.

        Raises:
            ReadError: the file's own trouble; or it took too long, too much memory, or the process down.
        """
        process = self._started()
        with self._within(self.limits.seconds) as late:
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(str(path)).encode() + b"\n")
                process.stdin.flush()
                frames = self._answer(process)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                self.close()
                if late():
                    detail = f"decoding took more than {self.limits.seconds:g} s, and was stopped"
                    raise ReadError("too-slow", detail) from None
                raise ReadError("worker-died", "the process that decoded the file was killed or crashed") from error
        return frames

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-c", _CODE, str(_PACKAGE), json.dumps(asdict(self.limits))]
            surroundings = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            pipe: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, env=surroundings, **pipe)
            with self._within(_STARTS):
                assert self._process.stdout is not None
                if self._process.stdout.readline() != b"ready\n":
                    self.close()
                    raise ReadError("worker-died", "the process that decodes files could not be started")
        return self._process

    @contextmanager
    def _within(self, seconds: float) -> Iterator[Callable[[], bool]]:
        """Kill the process where it takes longer; gives a function that says whether it did."""
        process, over = self._process, threading.Event()
        assert process is not None

        def stop() -> None:
            over.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            yield over.is_set
        finally:
            timer.cancel()

    def _answer(self, process: subprocess.Popen[bytes]) -> Array:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline(1 << 16))
        if "reason" in told:
            raise ReadError(str(told["reason"]), str(told["detail"]))
        count, rows, columns = (int(side) for side in told["shape"])
        if min(count, rows, columns) < 0 or count * rows * columns > self.limits.voxels:
            raise ValueError("a shape that nobody asked for")
        frames = np.empty((count, rows, columns), np.float32)
        _fill(process.stdout, frames.reshape(-1).view(np.uint8).data)
        return frames


def _fill(stream: IO[bytes], buffer: memoryview) -> None:
    """Read as many bytes as fit.

    Raises:
        OSError: the stream ends before.
    """
    place = 0
    while place < len(buffer):
        read = stream.readinto(buffer[place:])  # type: ignore[attr-defined]  # of a buffered pipe
        if not read:
            raise OSError("the process ended within its answer")
        place += read


@contextmanager
def decoding_apart(limits: Limits) -> Iterator[None]:
    """Within this, `dicom_pixels.frames_of` decodes in a process of its own.

    Args:
        limits: of each file.
    """
    apart = Apart(limits)
    token = DECODER.set(apart)
    try:
        yield
    finally:
        DECODER.reset(token)
        apart.close()


def serve(limits: str) -> None:
    """What the process does: decode the files that it is told, until nobody tells any more."""
    given = Limits(**json.loads(limits))
    _hold_back(given.memory)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        try:
            frames = frames_of(Path(json.loads(line)))
            if frames.size > given.voxels:
                raise ReadError("too-large", f"{frames.size:,} voxels; at most {given.voxels:,} are decoded")
            answer: dict[str, Any] = {"shape": frames.shape}
        except (ReadError, MemoryError) as error:
            frames = np.empty(0, np.float32)
            answer = _refusal(error, given)
        out.write(json.dumps(answer).encode() + b"\n")
        out.write(np.ascontiguousarray(frames).reshape(-1).view(np.uint8).data)
        out.flush()


def _refusal(error: Exception, limits: Limits) -> dict[str, str]:
    if isinstance(error, ReadError) and not isinstance(error.__cause__, MemoryError):
        return {"reason": error.reason, "detail": error.detail}
    spent = ReadError("too-much-memory", f"decoding needed more than {limits.memory / 2**30:.3g} GiB")
    return {"reason": spent.reason, "detail": spent.detail}


def _hold_back(memory: int) -> None:
    """No more memory than that, no file and no picture of the memory on disk."""
    try:
        import resource
    except ImportError:  # not on Windows: time alone is limited there
        return
    for what, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
