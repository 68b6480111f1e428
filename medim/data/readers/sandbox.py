"""Decode images in a separate process with limits, so that a hang, a crash or excessive memory use costs only one file.

The process has a memory limit and cannot write files; each file has a time limit. The process returns a line of JSON
and plain numbers. Nothing from a decoder is unpickled.

`predict` and `embed` decode all formats in the process; of DICOM files, only the pixels, because `header_scan` parses
the headers within limits. The other commands decode in their own process, within the limits of the readers.

The process costs about 1 s per command to start. Measured on two processors with other work (load 8, minimum of nine
runs), a read in the process took 0.4 to 1 ms more per X-ray of 224 x 224 pixels, and 0.3 to 3 ms more per MRI of 0.1 to
2.6 million voxels.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np

from medim.data.memory import allocated_address_space, available_memory
from medim.data.readers import find_reader, read_class_numbers
from medim.data.readers.base import DECODER, MAX_VOXELS, Reader, ReadError
from medim.data.readers.dicom.pixels import decode_and_rescale
from medim.data.readers.inspection import INSPECTION_ADAPTER, FileInspection
from medim.privacy import make_pseudonym
from medim.signals import block_interrupts, ignore_interrupts
from medim.types import Array, Volume

ReplyContent = TypeVar("ReplyContent")
_START_TIMEOUT = 60.0  # seconds to start the process
_PIPE_BYTES = 1 << 20
_MAX_REPLY_BYTES = 1 << 30  # of an inspection
_AFFINE_FIELDS = ("affine", "native_affine")
_DTYPES = {"float32": np.float32, "uint8": np.uint8, "uint16": np.uint16}
_PACKAGE_ROOT = Path(__file__).resolve().parents[3]
_WORKER_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from medim.data.readers import sandbox; sandbox.worker_main(sys.argv[2])"
)


class SlicePlanLike(Protocol):
    """Interface of `dicom.reader.SlicePlan`."""

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
        files: files per DICOM series.
        file_bytes: bytes of all files of the image.
        voxels: voxels of the image, according to the headers.
        seconds: decoding time per file.
        memory: bytes of address space of the decoding process; less if less memory is free when the process starts.
    """

    files: int = 10_000
    file_bytes: int = 8 << 30
    voxels: int = MAX_VOXELS
    seconds: float = 60.0
    memory: int = 6 << 30

    def check_plan(self, plan: SlicePlanLike) -> None:
        """Compare the headers of a DICOM image with the limits, before any pixel is decoded.

        Raises:
            ReadError: a limit is exceeded.
        """
        if len(plan.files) > self.files:
            raise ReadError("too-many-files", f"a series of {len(plan.files)} files; the limit is {self.files}")
        size = sum(path.stat().st_size for path in plan.files)
        self.check_image(size, len(plan.slices) * plan.size[0] * plan.size[1])

    def check_image(self, file_bytes: int, n_voxels: int) -> None:
        """Compare the size of an image with the limits.

        Raises:
            ReadError: a limit is exceeded.
        """
        if file_bytes > self.file_bytes or n_voxels > self.voxels:
            limit_text = f"the limits are {self.file_bytes / 2**30:.3g} GiB and {self.voxels:,} voxels"
            raise ReadError("too-large", f"{file_bytes / 2**30:.3g} GiB of files, {n_voxels:,} voxels; {limit_text}")


class DecoderProcess:
    """Decoder in a separate process, which starts with the first file and is restarted after each crash.

    Each method has the result and the errors of the function of that name, and further errors: decoding exceeded the
    limit of time, memory or voxels, or the process crashed.

    Args:
        limits: limits per file.
    """

    def __init__(self, limits: DecodingLimits) -> None:
        self.limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    def decode_frames(self, path: Path) -> Array:
        """Decode the frames of a DICOM file, see `pixels.decode_frames`."""
        return self._request("decode_frames", path, None, self._receive_array)[0]

    def read(self, path: Path, item: str | None) -> Volume:
        """Read one image, see `Reader.read`."""
        return self._request("read", path, item, self._receive_volume)

    def read_mask(self, path: Path, item: str | None) -> Volume:
        """Read one mask, see `MaskReader.read_mask`."""
        return self._request("read_mask", path, item, self._receive_volume)

    def inspect(self, path: Path) -> FileInspection:
        """List the images in a file, see `Reader.inspect`."""
        make_pseudonym("site")  # creates the site key, because the process cannot write it
        return self._request("inspect", path, None, self._receive_inspection)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _request(
        self,
        function: str,
        path: Path,
        item: str | None,
        receive: Callable[[IO[bytes], Mapping[str, Any]], ReplyContent],
    ) -> ReplyContent:
        """Call a function of the process, and receive its result."""
        process = self._ensure_process()
        with self._limit_time(self.limits.seconds) as is_late:
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps([function, str(path), item]).encode() + b"\n")
                process.stdin.flush()
                reply = json.loads(process.stdout.readline(1 << 16))
                result = None if "reason" in reply else receive(process.stdout, reply)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                self.close()
                if is_late():
                    detail = f"decoding took more than {self.limits.seconds:g} s and was stopped"
                    raise ReadError("too-slow", detail) from None
                raise ReadError("worker-died", "the decoding process was killed or crashed") from error
            except BaseException:  # no memory for the reply, or an interrupt: the rest of the reply is not read
                self.close()
                raise
        if result is None:
            raise ReadError(str(reply["reason"]), str(reply["detail"]))
        return result

    def _ensure_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            command = [sys.executable, "-P", "-c", _WORKER_CODE, str(_PACKAGE_ROOT), json.dumps(asdict(self.limits))]
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            with block_interrupts():
                self._process = subprocess.Popen(command, env=environment, **pipes)
            _enlarge_pipe(self._process.stdout)
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

    def _receive_array(self, stream: IO[bytes], reply: Mapping[str, Any]) -> tuple[Array]:
        shape = tuple(int(side) for side in reply["shape"])
        if min(shape) < 0 or math.prod(shape) > self.limits.voxels:
            raise ValueError("unexpected shape from the decoding process")
        array = np.empty(shape, _DTYPES[reply["dtype"]])
        _read_into(stream, array.reshape(-1).view(np.uint8).data)
        return (array,)

    def _receive_volume(self, stream: IO[bytes], reply: Mapping[str, Any]) -> Volume:
        affine, native_affine = (np.array(reply[name], np.float64).reshape(4, 4) for name in _AFFINE_FIELDS)
        native_shape = tuple(int(side) for side in reply["native_shape"])
        (array,) = self._receive_array(stream, reply)
        return Volume(array=array, affine=affine, native_affine=native_affine, native_shape=native_shape)

    def _receive_inspection(self, stream: IO[bytes], reply: Mapping[str, Any]) -> FileInspection:
        n_bytes = int(reply["inspection_bytes"])
        if not 0 <= n_bytes <= _MAX_REPLY_BYTES:
            raise ValueError("unexpected length from the decoding process")
        content = bytearray(n_bytes)
        _read_into(stream, memoryview(content))
        return INSPECTION_ADAPTER.validate_json(content)


def _enlarge_pipe(stream: IO[bytes] | None) -> None:
    """Enlarge the buffer of a pipe, so that a volume is transferred with fewer changes between the processes."""
    with suppress(ImportError, AttributeError, OSError):  # Linux only, and limited for a user
        import fcntl

        if stream is not None:
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


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
    """Make readers decode in a separate process inside the block.

    A block inside another one with the same limits uses its process, so that a program that calls `predict` for one
    image at a time starts the process once.

    Args:
        limits: limits per file.
    """
    outer_decoder = DECODER.get()
    if isinstance(outer_decoder, DecoderProcess) and outer_decoder.limits == limits:
        yield
        return
    decoder = DecoderProcess(limits)
    token = DECODER.set(decoder)
    try:
        yield
    finally:
        DECODER.reset(token)
        decoder.close()


def worker_main(limits_json: str) -> None:
    """Run the decoding process: call the functions named on standard input, until it is closed."""
    ignore_interrupts()
    worker_limits = DecodingLimits(**json.loads(limits_json))
    _set_resource_limits(worker_limits.memory)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of libraries must not mix with the replies
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        function, path, item = json.loads(line)
        try:
            reply, content = _FUNCTIONS[function](Path(path), item, worker_limits)
        except Exception as error:  # readers raise many exception types, and the process reads the next file
            reply, content = _encode_failure(error, worker_limits), memoryview(b"")
        out.write(json.dumps(reply).encode() + b"\n")
        out.write(content)
        out.flush()
        del content


Reply = tuple[Mapping[str, object], memoryview]


def _encode_frames(path: Path, _: str | None, limits: DecodingLimits) -> Reply:
    return _encode_array(decode_and_rescale(path), limits)


def _encode_image(path: Path, item: str | None, limits: DecodingLimits) -> Reply:
    return _encode_volume(_require_reader(path).read(path, item), limits)


def _encode_mask(path: Path, item: str | None, limits: DecodingLimits) -> Reply:
    return _encode_volume(read_class_numbers(_require_reader(path), path, item), limits)


def _encode_inspection(path: Path, _: str | None, limits: DecodingLimits) -> Reply:
    content = INSPECTION_ADAPTER.dump_json(_require_reader(path).inspect(path))
    return {"inspection_bytes": len(content)}, memoryview(content)


_FUNCTIONS: Mapping[str, Callable[[Path, str | None, DecodingLimits], Reply]] = {
    "decode_frames": _encode_frames,
    "read": _encode_image,
    "read_mask": _encode_mask,
    "inspect": _encode_inspection,
}


def _require_reader(path: Path) -> Reader:
    reader = find_reader(path)
    if reader is None:
        raise ReadError("not-an-image", "no reader accepts this file any more")
    return reader


def _encode_volume(volume: Volume, limits: DecodingLimits) -> Reply:
    reply, content = _encode_array(volume.array, limits)
    affines = {name: getattr(volume, name).tolist() for name in _AFFINE_FIELDS}
    return {**reply, **affines, "native_shape": [int(side) for side in volume.native_shape]}, content


def _encode_array(array: Array, limits: DecodingLimits) -> Reply:
    if array.size > limits.voxels:
        raise ReadError("too-large", f"{array.size:,} voxels; the limit is {limits.voxels:,}")
    content = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return {"shape": [int(side) for side in array.shape], "dtype": array.dtype.name}, content


def _encode_failure(error: Exception, limits: DecodingLimits) -> dict[str, str]:
    if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
        error = ReadError("too-much-memory", f"decoding needed more than {limits.memory / 2**30:.3g} GiB")
    elif isinstance(error, OSError):
        error = ReadError("unreadable", f"the file cannot be opened ({error.strerror})")
    elif not isinstance(error, ReadError):
        error = ReadError("reader-failed", f"the reader failed ({type(error).__name__}); please report it")
    return {"reason": error.reason, "detail": error.detail}


def _set_resource_limits(memory: int) -> None:
    """Limit the memory of this process, and forbid file writes and core dumps.

    The free memory of the machine or control group is a limit too: beyond it, the kernel would end this process, or the
    one that waits for it.
    """
    try:
        import resource
    except ImportError:  # not available on Windows: only the time limit applies there
        return
    memory = min(memory, allocated_address_space() + available_memory())
    for resource_id, maximum in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        _, hard_limit = resource.getrlimit(resource_id)
        resource.setrlimit(
            resource_id, (maximum if hard_limit == resource.RLIM_INFINITY else min(maximum, hard_limit), hard_limit)
        )
