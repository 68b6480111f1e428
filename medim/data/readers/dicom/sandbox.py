"""Decode DICOM pixels in a separate process with limits, so that a hang or excessive memory use costs only one file.

The process has a memory limit and cannot write files; each file has a time limit. The process returns a line of JSON
and plain numbers. Nothing from a decoder is unpickled.
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
from medim.data.readers.dicom.pixels import DECODER, decode_frames
from medim.types import Array

_START_TIMEOUT = 60.0  # seconds to start the process
_PACKAGE_ROOT = Path(__file__).resolve().parents[4]
_WORKER_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from medim.data.readers.dicom import sandbox; sandbox.worker_main(sys.argv[2])"
)


class SlicePlanLike(Protocol):
    """Interface of `reader.SlicePlan`."""

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


@dataclass(frozen=True, kw_only=True)
class DecodingLimits:
    """Limits for decoding one image.

    Attributes:
        files: files per series.
        file_bytes: bytes of all files of the series.
        voxels: rows x columns x frames of the image, according to the headers.
        seconds: decoding time per file.
        memory: bytes of address space of the decoding process.
    """

    files: int = 10_000
    file_bytes: int = 8 << 30
    voxels: int = 1 << 29
    seconds: float = 60.0
    memory: int = 6 << 30

    def check_plan(self, plan: SlicePlanLike) -> None:
        """Compare the headers of an image with the limits, before any pixel is decoded.

        Raises:
            ReadError: a limit is exceeded.
        """
        if len(plan.files) > self.files:
            raise ReadError("too-many-files", f"a series of {len(plan.files)} files; the limit is {self.files}")
        size = sum(path.stat().st_size for path in plan.files)
        voxels = len(plan.slices) * plan.size[0] * plan.size[1]
        if size > self.file_bytes or voxels > self.voxels:
            limit_text = f"the limits are {self.file_bytes / 2**30:.3g} GiB and {self.voxels:,} voxels"
            raise ReadError("too-large", f"{size / 2**30:.3g} GiB of files, {voxels:,} voxels; {limit_text}")


class DecoderProcess:
    """Decoder in a separate process, which starts with the first file and is restarted after each crash.

    Args:
        limits: limits per file.
    """

    def __init__(self, limits: DecodingLimits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, path: Path) -> Array:
        """Decode the frames of a file, see `pixels.decode_frames`.

        Raises:
            ReadError: the file cannot be decoded; or decoding exceeded the time or memory limit, or crashed.
        """
        process = self._ensure_process()
        with self._limit_time(self.limits.seconds) as is_late:
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(str(path)).encode() + b"\n")
                process.stdin.flush()
                frames = self._receive_frames(process)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                self.close()
                if is_late():
                    detail = f"decoding took more than {self.limits.seconds:g} s and was stopped"
                    raise ReadError("too-slow", detail) from None
                raise ReadError("worker-died", "the decoding process was killed or crashed") from error
        return frames

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ensure_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-c", _WORKER_CODE, str(_PACKAGE_ROOT), json.dumps(asdict(self.limits))]
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, env=environment, **pipes)
            with self._limit_time(_START_TIMEOUT):
                assert self._process.stdout is not None
                if self._process.stdout.readline() != b"ready\n":
                    self.close()
                    raise ReadError("worker-died", "the decoding process could not be started")
        return self._process

    @contextmanager
    def _limit_time(self, seconds: float) -> Iterator[Callable[[], bool]]:
        """Kill the process after a time limit; yields a function that returns whether it was killed."""
        process, timeout = self._process, threading.Event()
        assert process is not None

        def kill_process() -> None:
            timeout.set()
            process.kill()

        timer = threading.Timer(seconds, kill_process)
        timer.daemon = True
        timer.start()
        try:
            yield timeout.is_set
        finally:
            timer.cancel()

    def _receive_frames(self, process: subprocess.Popen[bytes]) -> Array:
        assert process.stdout is not None
        reply = json.loads(process.stdout.readline(1 << 16))
        if "reason" in reply:
            raise ReadError(str(reply["reason"]), str(reply["detail"]))
        count, rows, columns = (int(side) for side in reply["shape"])
        if min(count, rows, columns) < 0 or count * rows * columns > self.limits.voxels:
            raise ValueError("unexpected shape from the decoding process")
        frames = np.empty((count, rows, columns), np.float32)
        _read_into(process.stdout, frames.reshape(-1).view(np.uint8).data)
        return frames


def _read_into(stream: IO[bytes], buffer: memoryview) -> None:
    """Fill a buffer from a stream.

    Raises:
        OSError: the stream ends early.
    """
    offset = 0
    while offset < len(buffer):
        n_bytes = stream.readinto(buffer[offset:])  # type: ignore[attr-defined]  # of a buffered pipe
        if not n_bytes:
            raise OSError("the process ended during its reply")
        offset += n_bytes


@contextmanager
def sandboxed_decoding(limits: DecodingLimits) -> Iterator[None]:
    """Make `pixels.decode_frames` decode in a separate process inside the block.

    Args:
        limits: limits per file.
    """
    decoder = DecoderProcess(limits)
    token = DECODER.set(decoder)
    try:
        yield
    finally:
        DECODER.reset(token)
        decoder.close()


def worker_main(limits_json: str) -> None:
    """Run the decoding process: decode the files named on standard input, until it is closed."""
    worker_limits = DecodingLimits(**json.loads(limits_json))
    _set_resource_limits(worker_limits.memory)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        try:
            frames = decode_frames(Path(json.loads(line)))
            if frames.size > worker_limits.voxels:
                raise ReadError("too-large", f"{frames.size:,} voxels; the limit is {worker_limits.voxels:,}")
            reply: dict[str, object] = {"shape": frames.shape}
        except (ReadError, MemoryError) as error:
            frames = np.empty(0, np.float32)
            reply = dict(_encode_failure(error, worker_limits))
        out.write(json.dumps(reply).encode() + b"\n")
        out.write(np.ascontiguousarray(frames).reshape(-1).view(np.uint8).data)
        out.flush()


def _encode_failure(error: Exception, limits: DecodingLimits) -> dict[str, str]:
    if isinstance(error, ReadError) and not isinstance(error.__cause__, MemoryError):
        return {"reason": error.reason, "detail": error.detail}
    memory_failure = ReadError("too-much-memory", f"decoding needed more than {limits.memory / 2**30:.3g} GiB")
    return {"reason": memory_failure.reason, "detail": memory_failure.detail}


def _set_resource_limits(memory: int) -> None:
    """Limit the memory of this process, and forbid file writes and core dumps."""
    try:
        import resource
    except ImportError:  # not available on Windows: only the time limit applies there
        return
    for resource_id, maximum in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard_limit = resource.getrlimit(resource_id)
        resource.setrlimit(
            resource_id, (maximum if hard_limit == resource.RLIM_INFINITY else min(maximum, hard_limit), hard_limit)
        )
