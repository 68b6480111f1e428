"""Output folders of commands: locked while a command writes, and never left with a part of a result.

A folder contains `.medim`: the lock of the folder, and a JSON record with the command, its process, the state and the
files of the result. A result is written to the subfolder `.medim-new`, and takes its place in the folder when it is
complete, so a command that fails or is killed changes no earlier result. Long trainings write to a new folder itself,
where their history and checkpoints can be followed; `--overwrite` of an earlier training uses `.medim-new`, too.

`--overwrite` replaces a result of the same command only, and only if the folder contains no other files.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Literal

from medim.files import TEMPORARY_SUFFIX, remove_temporary_files
from medim.privacy import format_path
from medim.types import UserError

log = logging.getLogger(__name__)
MARKER = ".medim"
STAGING = ".medim-new"  # result that is being written
READY = ".medim-ready"  # complete result on its way to its place
REPLACED = ".medim-old"  # earlier result on its way to deletion
INTERNAL_NAMES = frozenset({MARKER, STAGING, READY, REPLACED})
SYSTEM_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})  # written by file managers
REJECTIONS_FILE = "rejected.csv"  # files that could not be used, with the reasons
SUMMARY_FILE = "summary.json"  # its presence means success: the first to leave and the last to arrive
SOURCE_COMMANDS = frozenset({"example", "fetch"})  # their results are images to read

State = Literal["writing", "stopped", "removing", "installing", "rejected", "complete"]


@dataclass(frozen=True)
class OutputRecord:
    """Content of `.medim`.

    Attributes:
        command: command that wrote the result.
        state: "writing" by `process`, "stopped" before the end, "removing" the earlier result or "installing" the new
            one, "rejected" if the folder contains nothing but `rejected.csv`, or "complete".
        process: process id of the command.
        files: files of the result relative to the folder; those of the earlier result in the state "removing".
    """

    command: str
    state: State
    process: int
    files: tuple[str, ...] = ()


@contextmanager
def output_folder(
    out: Path,
    command: str,
    *,
    overwrite: bool = False,
    resume: bool = False,
    inputs: Iterable[Path] = (),
    direct_files: Sequence[str] = (),
    start_files: Sequence[str] = (),
    resumable: bool = False,
) -> Iterator[Path]:
    """Lock an output folder, and provide the folder to write the result to.

    Args:
        out: output folder; created with its parents.
        command: name of the command; it may replace or continue only its own results.
        overwrite: replace an earlier result when the new one is complete.
        resume: continue a result of the same command.
        inputs: files and folders that the command reads; `overwrite` is refused for a folder that is or contains one.
        direct_files: patterns of the files that the command writes to a new `out` directly, such as "checkpoints/*";
            empty if the result appears when it is complete.
        start_files: those without work, such as "config.yaml"; a folder with nothing else is used as a new one.
        resumable: keep an incomplete result after an error. Implied by `direct_files`.

    Yields:
        Folder for the files of the result: `out`, or a subfolder; its content is moved to `out` at the end.

    Raises:
        UserError: `out` is a file, cannot be written, is used by another command, or is not empty and cannot be
            continued or replaced.
    """
    _check_before_locking(out, overwrite=overwrite, resume=resume)
    with _open_marker(out) as marker:
        previous = _complete_replacement(out, marker)
        if not resume and _is_unstarted(out, previous, command, start_files):
            _remove_content(out)
        flags = {"overwrite": overwrite, "resume": resume, "resumable": resumable}
        folder = _select_folder(out, previous, command, **flags, inputs=inputs, direct_files=direct_files)
        is_direct = folder == out
        foreign = _list_foreign_files(out, previous, direct_files)
        record = OutputRecord(command, "writing", os.getpid(), () if is_direct else _list_files(out, foreign))
        keeps_earlier = not is_direct and _has_content(out)
        try:
            _write_record(marker, replace(previous, process=os.getpid()) if previous and keeps_earlier else record)
            folder.mkdir(exist_ok=True)
            yield folder
        except BaseException:
            _settle_failure(out, folder, marker, record, previous, foreign, keep=resumable or bool(direct_files))
            raise
        if is_direct:
            _write_record(marker, replace(record, state="complete", files=_list_files(out, foreign)))
        else:
            _replace_result(out, marker, record)


def write_rejection_file(out: Path, command: str, write: Callable[[Path], None]) -> None:
    """Write the reasons why a command wrote no result: to `out/rejected.csv`, or beside an earlier result.

    Args:
        out: output folder.
        command: name of the command.
        write: function that writes a file to a path.
    """
    if _has_content(out) and not _is_rejection(read_record(out), command):
        write(out.resolve().with_name(f"{out.resolve().name}.rejected.csv"))
        return
    with _open_marker(out) as marker:
        write(out / REJECTIONS_FILE)
        _write_record(marker, OutputRecord(command, "rejected", os.getpid(), (REJECTIONS_FILE,)))


def record_output_file(path: Path) -> None:
    """Add a file that was written to a result later, so that `--overwrite` may replace it."""
    out = path.parent
    record = read_record(out)
    if record is None or record.state != "complete" or path.name in record.files:
        return
    with suppress(UserError), _open_marker(out) as marker:
        _write_record(marker, replace(record, files=(*record.files, path.name)))


def is_result_folder(folder: Path) -> bool:
    """Whether a folder contains the result of a command that writes no images to read, such as predictions."""
    record = read_record(folder)
    return record is not None and record.command not in SOURCE_COMMANDS


def read_record(out: Path) -> OutputRecord | None:
    """Read the record of a folder; None if it has none, as in folders of earlier versions, or a damaged one."""
    try:
        return _parse_record((out / MARKER).read_text())
    except (OSError, UnicodeDecodeError):
        return None


@contextmanager
def acquire_lock(path: Path, *, wait: bool) -> Iterator[IO[str]]:
    """Acquire an exclusive lock on a file; repeats if the previous owner removed the file in the meantime.

    `filelock` would not replace the loop: it raises an error if the previous owner removed the folder, too.

    Args:
        path: file, created with its parents if missing.
        wait: wait for another owner.

    Yields:
        The file, opened for reading and writing.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is false.
        OSError: the file cannot be created.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+", encoding="utf-8", errors="replace"
        )
        try:
            _lock_file(file, path, wait=wait)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BaseException:
            file.close()
            raise
        file.close()
    with file:
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing alone would leave it to forked processes, such as loaders


def _lock_file(file: IO[str], path: Path, *, wait: bool) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        log.info("%s: another medim command is using this folder; waiting for it", path.parent)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}:
            raise
        log.warning("%s: this file system has no locks; do not run two commands with this folder", path.parent)


@contextmanager
def _open_marker(out: Path) -> Iterator[IO[str]]:
    """Lock `out`; remove the marker, and `out` if it is new, if the folder stays empty."""
    is_new, is_marked = not out.exists(), (out / MARKER).exists()
    with ExitStack() as stack:
        try:
            marker = stack.enter_context(acquire_lock(out / MARKER, wait=False))
        except BlockingIOError:
            record = read_record(out)
            process = f" (process {record.process})" if record else ""
            raise UserError(
                f"{out}: another medim command{process} is writing to this folder. "
                "Wait for it, or choose another --out."
            ) from None
        except OSError as error:
            raise UserError(f"{out}: could not be written ({error.strerror}). Choose another --out.") from error
        try:
            yield marker
        finally:
            if not is_marked and {path.name for path in out.iterdir()} == {MARKER}:
                (out / MARKER).unlink()
                if is_new:
                    out.rmdir()


def _check_before_locking(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse folders in which not even a lock may be created."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: expected a folder for the output, got a file. Choose another --out.")
    if not _has_content(out) or resume or (out / MARKER).is_file():
        return
    if overwrite:
        raise UserError(f"{out}: --overwrite replaces only results of medim. Empty the folder yourself.")
    _raise_not_empty(out)


def _raise_not_empty(out: Path) -> None:
    raise UserError(
        f"{out}: expected an empty or new folder. "
        "Use another --out, --resume if the command can continue, or --overwrite to replace its earlier result."
    )


def _select_folder(
    out: Path,
    previous: OutputRecord | None,
    command: str,
    *,
    overwrite: bool,
    resume: bool,
    resumable: bool,
    inputs: Iterable[Path],
    direct_files: Sequence[str],
) -> Path:
    """Select the folder to write to, after checking that the earlier content may be continued or replaced."""
    staging = out / STAGING
    if resume:
        if previous is not None and previous.command != command:
            raise UserError(
                f"{out}: --resume continues only a result of `medim {command}`; this folder contains one of "
                f"`medim {previous.command}`. Choose another --out."
            )
        folder = staging if staging.is_dir() or (not direct_files and not _has_content(out)) else out
        remove_temporary_files(folder)
        return folder
    if _has_content(out) and not _is_rejection(previous, command):
        if not overwrite:
            _raise_not_empty(out)
        _check_replaceable(out, previous, command, inputs, direct_files)
    elif resumable and not overwrite and staging.is_dir() and any(staging.iterdir()):
        _raise_not_empty(out)
    elif direct_files and not _has_content(out):
        staging = out
    shutil.rmtree(out / STAGING, ignore_errors=True)
    return staging


def _is_rejection(record: OutputRecord | None, command: str) -> bool:
    """Whether a folder contains nothing but the reasons why the same command wrote no result."""
    return record is not None and (record.state, record.command) == ("rejected", command)


def _is_unstarted(out: Path, previous: OutputRecord | None, command: str, start_files: Sequence[str]) -> bool:
    """Whether a folder contains only files from the start of the same command, which is not running any more."""
    if previous is None or previous.command != command or previous.state not in {"writing", "stopped"}:
        return False
    files = [file for file in _list_files(out) if not _is_disposable(file)]
    if previous.state == "stopped" and not set(files) <= set(previous.files):  # files that the user added since
        return False
    return bool(files) and all(any(fnmatchcase(file, pattern) for pattern in start_files) for file in files)


def _remove_content(out: Path) -> None:
    """Remove the files of an attempt without a checkpoint and a result from a folder, except its lock."""
    log.info("%s: replacing the files of an attempt that had no checkpoint and no result", out)
    for path in out.iterdir():
        if path.name in INTERNAL_NAMES:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_replaceable(
    out: Path, previous: OutputRecord | None, command: str, inputs: Iterable[Path], direct_files: Sequence[str]
) -> None:
    """Refuse to replace inputs of the command, results of other commands, and files that no command wrote."""
    for path in inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise UserError(
                f"{out}: --overwrite would delete {format_path(path)}, an input of this command. Choose another --out."
            )
    if previous is not None and previous.command != command:
        raise UserError(
            f"{out}: --overwrite replaces only a result of `medim {command}`; this folder contains one of "
            f"`medim {previous.command}`. Choose another --out."
        )
    foreign = _list_foreign_files(out, previous, direct_files)
    if foreign and previous is None and not direct_files:
        raise UserError(
            f"{out}: an earlier version of medim wrote this folder without a list of its files, so --overwrite cannot "
            "distinguish them from others. Delete the folder yourself, or choose another --out."
        )
    if foreign:
        others = f" and {len(foreign) - 1} others" if len(foreign) > 1 else ""
        raise UserError(
            f"{out}: --overwrite would delete {foreign[0]}{others}, which `medim {command}` did not write. "
            "Move such files to another folder, or choose another --out."
        )


def _has_content(out: Path) -> bool:
    return out.is_dir() and any(path.name not in INTERNAL_NAMES for path in out.iterdir())


def _list_files(out: Path, excluded: Iterable[str] = ()) -> tuple[str, ...]:
    """List all files below a folder, as relative POSIX paths in order, without those of the exchange itself."""
    omitted = set(excluded)
    paths = (
        Path(folder, name).relative_to(out)
        for folder, subfolders, names in os.walk(out)
        for name in (*names, *(name for name in subfolders if Path(folder, name).is_symlink()))
    )
    return tuple(
        sorted(p.as_posix() for p in paths if p.parts[0] not in INTERNAL_NAMES and p.as_posix() not in omitted)
    )


def _is_disposable(file: str) -> bool:
    """Whether a file belongs to a file manager, or is an unfinished one of a process that was killed."""
    name = file.rpartition("/")[2]
    return name in SYSTEM_FILES or fnmatchcase(name, f".*{TEMPORARY_SUFFIX}")


def _list_foreign_files(out: Path, record: OutputRecord | None, direct_files: Sequence[str]) -> list[str]:
    """List the files that do not belong to the result: neither recorded, nor of a training that was killed."""
    recorded = set(record.files) if record else set()
    patterns = () if record and record.state == "complete" else direct_files
    return [
        file
        for file in _list_files(out)
        if file not in recorded
        and not _is_disposable(file)
        and not any(fnmatchcase(file, pattern) for pattern in patterns)
    ]


def _settle_failure(
    out: Path,
    folder: Path,
    marker: IO[str],
    record: OutputRecord,
    previous: OutputRecord | None,
    foreign: list[str],
    *,
    keep: bool,
) -> None:
    """Keep the files that `--resume` can continue and remove the others, after an error or a stop."""
    with suppress(OSError):  # such as a full disk; the error of the command is the one to report
        if folder == out:
            if _has_content(out):
                _write_record(marker, replace(record, state="stopped", files=_list_files(out, foreign)))
            return
        if not keep or not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        if previous is None and not _has_content(out):
            _write_record(marker, replace(record, state="stopped", files=()))


def _replace_result(out: Path, marker: IO[str], record: OutputRecord) -> None:
    """Exchange the earlier result (the files of the record) for the one in `.medim-new`.

    Each step is recorded first, so that `_complete_replacement` can finish the exchange after a kill.
    """
    (out / STAGING).rename(out / READY)
    record = replace(record, state="removing")
    _write_record(marker, record)
    _finish_replacement(out, marker, record)


def _complete_replacement(out: Path, marker: IO[str]) -> OutputRecord | None:
    """Finish an exchange that was killed; return the record of the folder."""
    marker.seek(0)
    record = _parse_record(marker.read())
    if record is not None and record.state == "installing" and not (out / READY).is_dir():
        record = replace(record, state="complete")
    elif record is not None and (out / READY).is_dir():
        if record.state not in {"removing", "installing"}:  # killed between the renaming and the recording
            record = replace(record, state="removing")
        record = _finish_replacement(out, marker, record)
    shutil.rmtree(out / REPLACED, ignore_errors=True)
    return record


def _finish_replacement(out: Path, marker: IO[str], record: OutputRecord) -> OutputRecord:
    ready, replaced = out / READY, out / REPLACED
    if record.state == "removing":
        replaced.mkdir(exist_ok=True)
        names = {file.partition("/")[0] for file in record.files}
        for name in sorted(names, key=lambda name: name != SUMMARY_FILE):
            if os.path.lexists(out / name):
                (out / name).rename(replaced / name)
        record = replace(record, state="installing", files=_list_files(ready))
        _write_record(marker, record)
    for path in sorted(ready.iterdir(), key=lambda path: path.name == SUMMARY_FILE):
        path.rename(out / path.name)
    ready.rmdir()
    record = replace(record, state="complete")
    _write_record(marker, record)
    shutil.rmtree(replaced, ignore_errors=True)
    return record


def _write_record(marker: IO[str], record: OutputRecord) -> None:
    """Write the record into the locked file; a record that is cut by a kill is read as none."""
    marker.seek(0)
    marker.write(json.dumps({"schema_version": 1, **asdict(record)}) + "\n")
    marker.truncate()  # last, so that a full disk does not empty it
    marker.flush()
    os.fsync(marker.fileno())


def _parse_record(text: str) -> OutputRecord | None:
    try:
        content = json.loads(text)
        files = tuple(str(name) for name in content["files"])
        return OutputRecord(str(content["command"]), content["state"], int(content["process"]), files)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
