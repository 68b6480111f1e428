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

_TRANSLITERATIONS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae", "ß": "ss"})
_MIN_PARTIAL_LENGTH = (
    4  # a value shorter than this hides a path part only where it is the whole part: an ID of "2" is no word
)


def load_site_key() -> bytes:
    """The secret of this site.

    `MEDIM_SITE_KEY` where it is set, else the file `medim/site.key` (mode 0600) in the user's config folder
    (`$XDG_CONFIG_HOME` or `~/.config`), which is made once.

    Raises:
        UserError: the file can be neither read nor made.
    """
    key = os.environ.get("MEDIM_SITE_KEY", "")
    if key:
        return key.encode()
    name = _locate_key_file(os.environ.get("XDG_CONFIG_HOME"), os.environ.get("HOME"))
    try:
        return _load_key_file(name)
    except OSError as error:
        folder = Path(name).parent
        raise UserError(
            f"{folder}: expected to keep the site key here, got '{error.strerror}'. "
            "Set MEDIM_SITE_KEY, or XDG_CONFIG_HOME to a folder that can be written."
        ) from error


@lru_cache
def _locate_key_file(config: str | None, home: str | None) -> str:
    """Where the key file lies; asked for every pseudonym, so worked out once for these two variables."""
    return str(Path(config or Path.home() / ".config") / "medim" / "site.key")


@lru_cache
def _load_key_file(name: str) -> bytes:
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


def make_pseudonym(value: str, *, prefix: str = "s", digits: int = 12) -> str:
    """A stable stand-in for an identity: `s-` and some hex digits of its HMAC-SHA256 under the site key.

    Args:
        value: the identity.
        prefix: what it is of.
        digits: 12 tell ten thousands of subjects apart, and not millions of files.
    """
    digest = hmac.new(load_site_key(), value.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
    return f"{prefix}-{digest[:digits]}"


@lru_cache(maxsize=1 << 16)
def _hash_word(key: bytes, word: str) -> int:
    digest = hmac.digest(key, f"word {word}".encode("utf-8", "surrogateescape"), "sha256")
    return int.from_bytes(digest[:6])


def identity_tokens(identities: Iterable[str]) -> frozenset[int]:
    """What a `Scrubber` knows identities by: keyed like a pseudonym, so that they can be kept and nobody read them."""
    key = load_site_key()
    words = {word for value in identities if (word := "".join(_split_words(value)))}
    return frozenset(_hash_word(key, spelling) for word in words for spelling in _list_spellings(word))


class Scrubber:
    """Replaces the parts of a path that equal an identity attribute of a file.

    Case and separators do not matter, and other words may stand beside it: `Doe_John`, `DOE-JOHN` and `MR_DoeJohn_1`
    all hold the identity `Doe^John`. A value shorter than 4 characters counts only where it is the whole part.

    Args:
        identities: from `identity_tokens`.
    """

    def __init__(self, identities: Iterable[int]) -> None:
        self._tokens = frozenset(identities)

    def scrub_part(self, part: str) -> str:
        """One part of a path, or its pseudonym; the file's suffix stays."""
        return scrubbed_name(part) if self.contains_identity(part) else part

    def contains_identity(self, part: str) -> bool:
        """Whether a part of a path holds an identity, or bytes that are no text and could not be written down."""
        if not _is_text(part):
            return True
        if not self._tokens or part in {".", "..", "/"}:
            return False
        key = load_site_key()
        return any(
            (is_whole or len(run) >= _MIN_PARTIAL_LENGTH) and _hash_word(key, run) in self._tokens
            for name in {part, _split_suffix(part)[0]}
            for run, is_whole in _iterate_word_runs(_split_words(name))
        )

    def scrub_path(self, path: PurePath) -> str:
        """A relative path as it is written down, with `/` between its parts."""
        return "/".join(self.scrub_part(part) for part in path.parts)

    def scrub_text(self, text: str | None) -> str | None:
        """A free text, or None where it holds an identity."""
        return None if text is None or self.contains_identity(text) else text


def scrubbed_name(part: str) -> str:
    """What stands in an index for a path part that holds an identity."""
    stem, suffix = _split_suffix(part)
    return make_pseudonym(stem, prefix="p") + suffix


def resolve_scrubbed_path(folder: Path, scrubbed_path: str) -> Path:
    """The real path of a path that a `Scrubber` wrote, relative to a folder.

    Raises:
        UserError: nothing there has that name, or the site key is another one.
    """
    current = folder
    for part in PurePath(scrubbed_path).parts:
        candidate = current / part
        if part != ".." and not candidate.exists():
            real_name = (
                _map_scrubbed_names(str(current), current.stat().st_mtime_ns, load_site_key()).get(part)
                if current.is_dir()
                else None
            )
            if real_name is None:
                raise UserError(
                    f"{scrubbed_path}: expected this file of the index under its source, found none. "
                    "Was the source moved or changed, or another MEDIM_SITE_KEY set? Run `medim index` again."
                )
            candidate = current / real_name
        current = candidate
    return current


@lru_cache(maxsize=256)
def _map_scrubbed_names(folder: str, mtime_ns: int, key: bytes) -> dict[str, str]:
    """The names in a folder by what they are hidden as; worked out once, not for each of its thousands of patients."""
    names = sorted((entry.name for entry in Path(folder).iterdir()), reverse=True)
    return {scrubbed_name(name): name for name in names}


def _is_text(part: str) -> bool:
    """Whether a name is UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in part)


def _split_words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case, each letter in its one form."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def _list_spellings(word: str) -> set[str]:
    """Words as they are, as they are written without the letters of their language, and without accents."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", word) if not unicodedata.combining(letter))
    return {word, word.translate(_TRANSLITERATIONS), bare}


def _iterate_word_runs(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Every run of consecutive words, joined, and whether it is all of them."""
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            yield "".join(words[start:stop]), stop - start == len(words)


def _split_suffix(part: str) -> tuple[str, str]:
    """A file name as stem and suffix (`.nii.gz` is one suffix; the `.5` of a UID is none)."""
    match = re.fullmatch(r"(.+?)((?:\.nii|\.tar)?\.[A-Za-z][A-Za-z0-9]{0,4})", part)
    return (match[1], match[2]) if match else (part, "")
