"""Who an image belongs to, without saying who: keyed pseudonyms and paths without patients.

A pseudonym is HMAC-SHA256 under the site key. The key never leaves the site, so nobody outside can try names or IDs
against an index; two sites give one person two pseudonyms.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePath

from medim.types import UserError

log = logging.getLogger(__name__)

_SPELT = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae", "ß": "ss"})
_SHORT = 4  # a value shorter than this hides a path part only where it is the whole part: an ID of "2" is no word


def site_key() -> bytes:
    """The secret of this site.

    `MEDIM_SITE_KEY` where it is set, else the file `medim/site.key` (mode 0600) in the user's config folder
    (`$XDG_CONFIG_HOME` or `~/.config`), which is made once.

    Raises:
        UserError: the file can be neither read nor made.
    """
    given = os.environ.get("MEDIM_SITE_KEY", "")
    if given:
        return given.encode()
    name = _key_name(os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))
    try:
        return _key_file(name)
    except OSError as error:
        folder = Path(name).parent
        raise UserError(
            f"{folder}: expected to keep the site key here, got '{error.strerror}'. "
            "Set MEDIM_SITE_KEY, or XDG_CONFIG_HOME to a folder that can be written."
        ) from error


@lru_cache
def _key_name(config: str | None, home: str | None) -> str:
    """Where the key file lies; asked for every pseudonym, so worked out once for these two variables."""
    return str(Path(config or Path.home() / ".config") / "medim" / "site.key")


@lru_cache
def _key_file(name: str) -> bytes:
    """Read the key file, or make it: whole at once, so that two processes end with one key."""
    path = Path(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            log.debug("another process made the site key first")
        finally:
            draft.unlink()
    if path.stat().st_mode & 0o077:
        log.warning("the site key could be read by other users; its mode is now 0600")
        path.chmod(0o600)
    key = path.read_bytes().strip()
    if not key:
        raise UserError(f"{path}: expected the site key, got an empty file. Remove it, and a new key will be made.")
    return key


def pseudonym(value: str, *, prefix: str = "s", digits: int = 12) -> str:
    """A stable stand-in for an identity: `s-` and some hex digits of its HMAC-SHA256 under the site key.

    Args:
        value: the identity.
        prefix: what it is of.
        digits: 12 tell ten thousands of subjects apart, and not millions of files.
    """
    digest = hmac.new(site_key(), value.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
    return f"{prefix}-{digest[:digits]}"


@lru_cache(maxsize=1 << 16)
def _token(key: bytes, joined: str) -> int:
    digest = hmac.digest(key, f"word {joined}".encode("utf-8", "surrogateescape"), "sha256")
    return int.from_bytes(digest[:6])


def tokens(identities: Iterable[str]) -> frozenset[int]:
    """What a `Scrubber` knows identities by: keyed like a pseudonym, so that they can be kept and nobody read them."""
    key = site_key()
    words = {joined for value in identities if (joined := "".join(_words(value)))}
    return frozenset(_token(key, spelt) for joined in words for spelt in _spellings(joined))


class Scrubber:
    """Replaces the parts of a path that equal an identity attribute of a file.

    Case and separators do not matter, and other words may stand beside it: `Doe_John`, `DOE-JOHN` and `MR_DoeJohn_1`
    all hold the identity `Doe^John`. A value shorter than 4 characters counts only where it is the whole part.

    Args:
        identities: from `tokens`.
    """

    def __init__(self, identities: Iterable[int]) -> None:
        self._values = frozenset(identities)

    def part(self, part: str) -> str:
        """One part of a path, or its pseudonym; the file's suffix stays."""
        return hidden(part) if self.hides(part) else part

    def hides(self, part: str) -> bool:
        """Whether a part of a path holds an identity, or bytes that are no text and could not be written down."""
        if not _is_text(part):
            return True
        if not self._values or part in {".", "..", "/"}:
            return False
        key = site_key()
        return any(
            (whole or len(run) >= _SHORT) and _token(key, run) in self._values
            for name in {part, _split(part)[0]}
            for run, whole in _runs(_words(name))
        )

    def path(self, path: PurePath) -> str:
        """A relative path as it is written down, with `/` between its parts."""
        return "/".join(self.part(part) for part in path.parts)

    def text(self, text: str | None) -> str | None:
        """A free text, or None where it holds an identity."""
        return None if text is None or self.hides(text) else text


def hidden(part: str) -> str:
    """What stands in an index for a path part that holds an identity."""
    stem, suffix = _split(part)
    return pseudonym(stem, prefix="p") + suffix


def find(folder: Path, written: str) -> Path:
    """The real path of a path that a `Scrubber` wrote, relative to a folder.

    Raises:
        UserError: nothing there has that name, or the site key is another one.
    """
    here = folder
    for part in PurePath(written).parts:
        there = here / part
        if part != ".." and not there.exists():
            found = _hidden_names(str(here), here.stat().st_mtime_ns, site_key()).get(part) if here.is_dir() else None
            if found is None:
                raise UserError(
                    f"{written}: expected this file of the index under its source, found none. "
                    "Was the source moved or changed, or another MEDIM_SITE_KEY set? Run `medim index` again."
                )
            there = here / found
        here = there
    return here


@lru_cache(maxsize=256)
def _hidden_names(folder: str, changed: int, key: bytes) -> dict[str, str]:
    """The names in a folder by what they are hidden as; worked out once, not for each of its thousands of patients."""
    names = sorted((entry.name for entry in Path(folder).iterdir()), reverse=True)
    return {hidden(name): name for name in names}


def _is_text(part: str) -> bool:
    """Whether a name is UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in part)


def _words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case, each letter in its one form."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def _spellings(joined: str) -> set[str]:
    """Words as they are, as they are written without the letters of their language, and without accents."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", joined) if not unicodedata.combining(letter))
    return {joined, joined.translate(_SPELT), bare}


def _runs(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Every run of consecutive words, joined, and whether it is all of them."""
    for first in range(len(words)):
        for last in range(first + 1, len(words) + 1):
            yield "".join(words[first:last]), last - first == len(words)


def _split(part: str) -> tuple[str, str]:
    """A file name as stem and suffix (`.nii.gz` is one suffix; the `.5` of a UID is none)."""
    found = re.fullmatch(r"(.+?)((?:\.nii|\.tar)?\.[A-Za-z][A-Za-z0-9]{0,4})", part)
    return (found[1], found[2]) if found else (part, "")
