"""Tracebacks for `--debug` in which messages contain no names that may identify people."""

from __future__ import annotations

import re
import traceback

from medim.privacy import format_path
from medim.types import UserError

_PATH = re.compile(
    r"'[^'\n]*/[^'\n]*'|\"[^\"\n]*/[^\"\n]*\"|[^\s'\"]*/[^'\"\n]*"  # quoted, or from the first slash to the end
    r"|[^\s'\"]+\.(?:nii|dcm|png|jpe?g|tiff?|bmp|np[yz]|mh[ad]|nrrd|csv|tsv|json)(?:\.gz)?"
)


def describe_os_error(error: OSError) -> str:
    """Describe an error of the operating system, with the file in the form of `format_path`.

    Examples:
        >>> describe_os_error(FileNotFoundError(2, "No such file or directory", "/home/doe/scans/scan.nii"))
        'scan.nii: No such file or directory'
    """
    if error.strerror is None:
        return hide_paths(str(error))
    files = [format_path(str(name)) for name in (error.filename, error.filename2) if isinstance(name, str)]
    return ": ".join([*files, error.strerror])


def hide_paths(text: str) -> str:
    """Replace the paths in the message of a library by the form of `format_path`."""

    def format_match(match: re.Match[str]) -> str:
        quote = match[0][0] if match[0][0] in "'\"" else ""
        return f"{quote}{format_path(match[0].strip(quote or None))}{quote}"

    return _PATH.sub(format_match, text)


def format_traceback(error: BaseException) -> str:
    """Format an exception and its causes like Python, with the paths in their messages hidden."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\nwhich led to:\n\n".join(map(_format_one, reversed(chain)))


def _format_one(error: BaseException) -> str:
    frames = "".join(traceback.format_tb(error.__traceback__))
    if isinstance(error, UserError):
        message = str(error)
    else:
        message = describe_os_error(error) if isinstance(error, OSError) else hide_paths(str(error))
    return f"Traceback (most recent call last):\n{frames}{type(error).__qualname__}: {message}\n"
