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
from datetime import datetime
from functools import lru_cache
from itertools import permutations
from pathlib import Path, PurePath

from medim.neutral_names import is_neutral_name, list_identifying_words
from medim.types import UserError

log = logging.getLogger(__name__)

_TRANSLITERATIONS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe", "æ": "ae", "ß": "ss"})
# A shorter identity matches only a whole path part, not a word in it: an ID such as "2" occurs in many names.
_MIN_PARTIAL_LENGTH = 4
_MIN_NAME_LENGTH = 2  # an initial occurs in many names of files
_MAX_NUMBER_LENGTH = 16  # of an ID; a UID is longer and matches as a whole
_MIN_DATE_LENGTH = 6  # day, month and year of two digits each
_SUFFIX = re.compile(  # of a file that a reader accepts, or a table; others may be parts of a name, as in `J.Smith`
    r"(.+?)(\.(?:nii|dcm|dicom|ima|img|hdr|png|jpe?g|tiff?|bmp|np[yz]|mh[ad]|nh?rrd|z?raw|csv|tsv|json|txt|xml|zip|tar)"
    r"(?:\.gz)?)",
    re.IGNORECASE,
)


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


def identity_tokens(identities: Iterable[str], names: Iterable[str] = ()) -> frozenset[int]:
    """Compute the tokens of identities for a `Scrubber`: keyed hashes, which can be stored without revealing names.

    Args:
        identities: values that identify a person, time or place.
        names: names of persons, whose words are matched at any length.
    """
    key = load_site_key()
    words = {word for value in identities if (word := "".join(_split_words(value)))}
    spellings = {spelling for word in words for spelling in _list_spellings(word)}
    spellings |= {f"id {number}" for word in words for number in _list_numbers(word)}
    name_words = {word for name in names for word in _split_words(name) if len(word) >= _MIN_NAME_LENGTH}
    spellings |= {f"name {spelling}" for word in name_words for spelling in _list_spellings(word)}
    return frozenset(_hash_word(key, spelling) for spelling in spellings)


def text_tokens(texts: Iterable[str]) -> frozenset[int]:
    """Compute the tokens of free texts, such as the description in a NIfTI header: each text, and its words.

    Words that are neutral (`medim.neutral_names`) are left out.
    """
    names = list(texts)
    return identity_tokens(names, (word for text in names for word in list_identifying_words(text)))


class Scrubber:
    """Scrubber of paths: replaces the parts that contain an identity attribute of a file by pseudonyms.

    Matching ignores case and separators, and the part may contain other words: `Doe_John`, `DOE-JOHN` and
    `MR_DoeJohn_1` all match the identity `Doe^John`. An identity shorter than 4 characters matches only a whole part,
    but a name of a person matches a word of two letters or more (`Wu` in `Wu_MRI`). A date matches in any order of day,
    month and year. A number of 4 digits or more matches without its leading zeros and inside a word (`pat4711b`).

    Args:
        identities: tokens from `identity_tokens`.
        keep_names: keep the other parts; False replaces all parts that are not neutral (`medim.neutral_names`), because
            a file may be named after a person that its header does not contain.
    """

    def __init__(self, identities: Iterable[int], *, keep_names: bool = True) -> None:
        self._tokens = frozenset(identities)
        self._keep_names = keep_names

    def scrub_part(self, part: str) -> str:
        """Return one part of a path, or its pseudonym with the file suffix kept."""
        is_hidden = self.contains_identity(part) or not (self._keep_names or is_neutral_name(part))
        return scrubbed_name(part) if is_hidden else part

    def contains_identity(self, part: str) -> bool:
        """Whether a part of a path contains an identity, or bytes that are not UTF-8 and cannot be recorded."""
        if not _is_text(part):
            return True
        if not self._tokens or part in {".", "..", "/"}:
            return False
        key = load_site_key()
        return any(
            _hash_word(key, spelling) in self._tokens
            for name in {part, _split_suffix(part)[0]}
            for spelling in _iterate_spellings(_split_words(name))
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


def hide_name(name: str) -> str:
    """Return a name if it is neutral, or its pseudonym.

    Examples:
        >>> hide_name("T1_axial")
        'T1_axial'
    """
    return Scrubber((), keep_names=False).scrub_part(name)


def format_path(path: str | Path) -> str:
    """Format the path of images or of a table for a message, without names that are not neutral.

    A path in the working folder is given relative to it, any other only by its last part.

    Examples:
        >>> format_path("scans/labels.csv"), format_path("/home/doe/study/subjects.csv")
        ('scans/labels.csv', 'subjects.csv')
    """
    absolute = Path(os.path.normpath(Path(path).absolute()))
    is_inside = absolute.is_relative_to(Path.cwd()) and absolute != Path.cwd()
    shown = absolute.relative_to(Path.cwd()) if is_inside else PurePath(absolute.name or "/")
    return "/".join(map(hide_name, shown.parts))


def format_result_path(path: str | Path) -> str:
    """Format the path of a file that medim named, such as `summary.json`, without names in its folders.

    Examples:
        >>> format_result_path("indexes/doe/summary.json").endswith("/summary.json")
        True
    """
    path = Path(path)
    return f"{format_path(path.parent)}/{path.name}"


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
    try:
        names = sorted((entry.name for entry in Path(folder).iterdir()), reverse=True)
    except OSError:  # a folder without read permission, such as a parent of the user's home
        names = []
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
    return {word, word.translate(_TRANSLITERATIONS), bare} | _list_date_spellings(word)


def _list_date_spellings(word: str) -> set[str]:
    """List the spellings of a date `yyyymmdd` in other orders, with names of months and without leading zeros."""
    try:
        day = datetime.strptime(word, "%Y%m%d").date() if re.fullmatch(r"(19|20)\d{6}", word) else None
    except ValueError:
        return set()
    if day is None:
        return set()
    spellings = set()
    for month in (f"{day:%m}", str(day.month), f"{day:%b}".casefold(), f"{day:%B}".casefold()):
        for day_text in (f"{day:%d}", str(day.day)):
            for year in (f"{day:%Y}", f"{day:%y}"):
                spellings |= {"".join(parts) for parts in permutations((day_text, month, year))}
    return {spelling for spelling in spellings if len(spelling) >= _MIN_DATE_LENGTH}


def _list_numbers(word: str) -> set[str]:
    """List the numbers in a word without leading zeros: the whole of an ID of digits, or longer numbers in a word."""
    min_length = _MIN_PARTIAL_LENGTH if word.isdecimal() else _MIN_PARTIAL_LENGTH + 1
    numbers = {run.lstrip("0") for run in re.findall(r"[0-9]+", word)}
    return {number for number in numbers if min_length <= len(number) <= _MAX_NUMBER_LENGTH}


def _iterate_spellings(words: list[str]) -> Iterator[str]:
    """Yield the spellings of a path part that are compared with the tokens of identities.

    They are the runs of consecutive words, joined; the single words, as names; and the numbers in words.
    """
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            run = "".join(words[start:stop])
            if stop - start == len(words) or len(run) >= _MIN_PARTIAL_LENGTH:
                yield run
    for word in words:
        yield f"name {word}"
        for run in re.findall(r"[0-9]+", word):
            if len(number := run.lstrip("0")) >= _MIN_PARTIAL_LENGTH:
                yield f"id {number}"


def _split_suffix(part: str) -> tuple[str, str]:
    """Split a file name into stem and suffix (`.nii.gz` is one suffix; the `.5` of a UID is not a suffix)."""
    match = _SUFFIX.fullmatch(part)
    return (match[1], match[2]) if match else (part, "")
