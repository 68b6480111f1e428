"""Pseudonyms of subjects, and file paths without identifying parts.

A pseudonym is the HMAC-SHA256 of an identity under the site key. The key never leaves the site, so nobody outside can
test guessed names or IDs against an index. The same person has different pseudonyms at different sites.
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
# A shorter identity matches only a whole path part, not a word in it: an ID such as "2" occurs in many names.
_MIN_PARTIAL_LENGTH = 4


def load_site_key() -> bytes:
    """Return the secret key of this site.

    The key is `MEDIM_SITE_KEY` if set, else the content of the file `medim/site.key` (mode 0600) in the user's config
    folder (`$XDG_CONFIG_HOME` or `~/.config`). The file is created on first use.

    Raises:
        UserError: the file can be neither read nor created.
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
            f"{folder}: the site key can be neither read from nor written to this folder ({error.strerror}). "
            "Set MEDIM_SITE_KEY, or set XDG_CONFIG_HOME to a writable folder."
        ) from error


@lru_cache
def _locate_key_file(config: str | None, home: str | None) -> str:
    """Return the path of the key file; cached per pair of variables, as every pseudonym needs it."""
    return str(Path(config or Path.home() / ".config") / "medim" / "site.key")


@lru_cache
def _load_key_file(name: str) -> bytes:
    """Read the key file, or create it atomically, so that two processes end up with the same key."""
    path = Path(name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            log.debug("another process created the site key first")
        finally:
            temporary.unlink()
    if path.stat().st_mode & 0o077:
        log.warning("the site key was readable by other users; its mode is now 0600")
        path.chmod(0o600)
    key = path.read_bytes().strip()
    if not key:
        raise UserError(f"{path}: expected the site key, got an empty file. Remove it to create a new key.")
    return key


def make_pseudonym(value: str, *, prefix: str = "s", digits: int = 12) -> str:
    """Compute a stable pseudonym: `s-` and the first hex digits of the identity's HMAC-SHA256 under the site key.

    Args:
        value: the identity.
        prefix: kind of pseudonym, such as `s` for a subject.
        digits: number of hex digits; 12 are enough for tens of thousands of subjects, but not for millions of files.
    """
    digest = hmac.new(load_site_key(), value.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
    return f"{prefix}-{digest[:digits]}"


@lru_cache(maxsize=1 << 16)
def _hash_word(key: bytes, word: str) -> int:
    digest = hmac.digest(key, f"word {word}".encode("utf-8", "surrogateescape"), "sha256")
    return int.from_bytes(digest[:6])


def identity_tokens(identities: Iterable[str]) -> frozenset[int]:
    """Compute the tokens of identities for a `Scrubber`: keyed hashes, which can be stored without revealing names."""
    key = load_site_key()
    words = {word for value in identities if (word := "".join(_split_words(value)))}
    return frozenset(_hash_word(key, spelling) for word in words for spelling in _list_spellings(word))


class Scrubber:
    """Scrubber of paths: replaces the parts that contain an identity attribute of a file by pseudonyms.

    Matching ignores case and separators, and the part may contain other words: `Doe_John`, `DOE-JOHN` and
    `MR_DoeJohn_1` all match the identity `Doe^John`. An identity shorter than 4 characters matches only a whole part.

    Args:
        identities: tokens from `identity_tokens`.
    """

    def __init__(self, identities: Iterable[int]) -> None:
        self._tokens = frozenset(identities)

    def scrub_part(self, part: str) -> str:
        """Return one part of a path, or its pseudonym with the file suffix kept."""
        return scrubbed_name(part) if self.contains_identity(part) else part

    def contains_identity(self, part: str) -> bool:
        """Whether a part of a path contains an identity, or bytes that are not UTF-8 and cannot be recorded."""
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
        """Return a relative path in its recorded form, with `/` between its parts."""
        return "/".join(self.scrub_part(part) for part in path.parts)

    def scrub_text(self, text: str | None) -> str | None:
        """Return a free text, or None if it contains an identity."""
        return None if text is None or self.contains_identity(text) else text


def scrubbed_name(part: str) -> str:
    """Return the replacement in an index for a path part that contains an identity."""
    stem, suffix = _split_suffix(part)
    return make_pseudonym(stem, prefix="p") + suffix


def resolve_scrubbed_path(folder: Path, scrubbed_path: str) -> Path:
    """Find the real path of a path that a `Scrubber` wrote.

    Args:
        folder: folder that the path is relative to.
        scrubbed_path: path as recorded in the index.

    Raises:
        UserError: no file has that name, or the site key differs from the one used for the index.
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
                    "Was the source moved or changed, or is another MEDIM_SITE_KEY set? Run `medim index` again."
                )
            candidate = current / real_name
        current = candidate
    return current


@lru_cache(maxsize=256)
def _map_scrubbed_names(folder: str, mtime_ns: int, key: bytes) -> dict[str, str]:
    """Map the scrubbed names in a folder to the real names; cached, because a folder can have thousands of patients."""
    names = sorted((entry.name for entry in Path(folder).iterdir()), reverse=True)
    return {scrubbed_name(name): name for name in names}


def _is_text(part: str) -> bool:
    """Whether a name is valid UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in part)


def _split_words(text: str) -> list[str]:
    """List the runs of letters and digits of a text, in lower case and Unicode normal form NFKC."""
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())


def _list_spellings(word: str) -> set[str]:
    """List spellings of a word: unchanged, transliterated to ASCII (`ä` to `ae`), and without diacritics."""
    bare = "".join(letter for letter in unicodedata.normalize("NFKD", word) if not unicodedata.combining(letter))
    return {word, word.translate(_TRANSLITERATIONS), bare}


def _iterate_word_runs(words: list[str]) -> Iterator[tuple[str, bool]]:
    """Yield every run of consecutive words, joined, and whether the run contains all words."""
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            yield "".join(words[start:stop]), stop - start == len(words)


def _split_suffix(part: str) -> tuple[str, str]:
    """Split a file name into stem and suffix (`.nii.gz` is one suffix; the `.5` of a UID is not a suffix)."""
    match = re.fullmatch(r"(.+?)((?:\.nii|\.tar)?\.[A-Za-z][A-Za-z0-9]{0,4})", part)
    return (match[1], match[2]) if match else (part, "")
