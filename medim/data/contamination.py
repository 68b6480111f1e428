"""What an encoder or a model has seen, in a file that it carries wherever it goes.

`fingerprints.json` lies beside the weights, and in the package. Every entry is an HMAC-SHA256 under a salt of its own
run: who holds an image can ask whether it was seen; nobody can read from the file whose images they were, nor compare
two files. Images are known everywhere, subjects only at the site whose key made their pseudonyms.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from medim.data.fingerprints import fingerprint
from medim.data.index.index import Record
from medim.files import json_bytes, read_json, write_bytes
from medim.privacy import pseudonym
from medim.types import UserError, Volume

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FINGERPRINTS = "fingerprints.json"
Kind = Literal["pretrain", "finetune"]
Case = tuple[str, str]  # fingerprint and subject of an image
Counts = dict[str, dict[str, int | None]]  # kind: {"images": ..., "subjects": ...}; None where it is not known


@dataclass(frozen=True)
class Origin:
    """A training that the weights went through.

    Attributes:
        kind: without labels (pretrain) or with them (finetune).
        salt: of this training, random.
        site: stands for the site key that the subjects are under.
        images: salted fingerprints.
        subjects: salted pseudonyms.
    """

    kind: Kind
    salt: str
    site: str
    images: frozenset[str]
    subjects: frozenset[str]

    @classmethod
    def of(cls, kind: Kind, cases: Iterable[Case]) -> Origin:
        """The record of a training on some images, under a new salt."""
        salt, cases = secrets.token_hex(16), list(cases)
        images = frozenset(_salted(salt, found) for found, _ in cases if found)
        people = frozenset(_salted(salt, subject) for _, subject in cases)
        return cls(kind, salt, _salted(salt, pseudonym("site")), images, people)

    @property
    def here(self) -> bool:
        """Whether its subjects are under this site's key."""
        return self.site == _salted(self.salt, pseudonym("site"))

    def has_image(self, fingerprint: str) -> bool:
        """Whether it saw an image with these pixels."""
        return bool(fingerprint) and _salted(self.salt, fingerprint) in self.images

    def has_subject(self, subject: str) -> bool:
        """Whether it saw this subject; no subject is known from another site."""
        return self.here and _salted(self.salt, subject) in self.subjects


@dataclass(frozen=True)
class Seen:
    """All trainings that the weights went through; none for fresh weights.

    Attributes:
        origins: what each saw.
        unknown: kinds of training that happened before, without a record.
    """

    origins: tuple[Origin, ...] = ()
    unknown: tuple[Kind, ...] = ()

    def has(self, kind: Kind, case: Case) -> bool:
        """Whether an image, or its subject, was seen in trainings of a kind."""
        image, subject = case
        return any(o.has_image(image) or o.has_subject(subject) for o in self.origins if o.kind == kind)

    def count(self, cases: Sequence[Case]) -> Counts:
        """How many of some images, and of their subjects, each kind of training has seen."""
        found: Counts = {}
        for kind in get_args(Kind):
            origins = [origin for origin in self.origins if origin.kind == kind]
            known = kind not in self.unknown
            images = sum(any(o.has_image(image) for o in origins) for image, _ in cases)
            people = sum(any(o.has_subject(one) for o in origins) for one in {subject for _, subject in cases})
            site = known and all(origin.here for origin in origins)
            found[kind] = {"images": images if known else None, "subjects": people if site else None}
        return found

    def then(self, kind: Kind, cases: Iterable[Case]) -> Seen:
        """The record after one more training."""
        return Seen((*self.origins, Origin.of(kind, cases)), self.unknown)

    def dump(self) -> bytes:
        """The content of `fingerprints.json`."""
        origins = [
            {
                "kind": origin.kind,
                "salt": origin.salt,
                "site": origin.site,
                "images": sorted(origin.images),
                "subjects": sorted(origin.subjects),
            }
            for origin in self.origins
        ]
        return json_bytes({"schema_version": SCHEMA_VERSION, "origins": origins, "unknown": list(self.unknown)})

    def write(self, folder: Path) -> None:
        """Write `fingerprints.json`."""
        write_bytes(folder / FINGERPRINTS, self.dump())


def read_seen(path: Path) -> Seen | None:
    """What the weights of a run, of its `encoder/` or `model/`, or of a package have seen; None where none says.

    Raises:
        UserError: the file is damaged or of another schema.
    """
    folders = (path, path / "model", path / "encoder")
    file = next((folder / FINGERPRINTS for folder in folders if (folder / FINGERPRINTS).is_file()), None)
    if file is None:
        return None
    content = read_json(file)
    try:
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}")
        return Seen(tuple(_origin(one) for one in content["origins"]), tuple(_kind(k) for k in content["unknown"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected fingerprints of schema version {SCHEMA_VERSION}, got something else "
            f"({type(error).__name__}: {error}). Copy the folder again."
        ) from error


def guard(seen: Seen | None, cases: Sequence[Case], *, what: str, strict: bool = False) -> Counts | None:
    """Say how many of the images to measure on were seen, and with `strict` refuse where any was.

    Args:
        seen: what `read_seen` found.
        cases: the images to measure on.
        what: the weights, for messages.
        strict: refuse.

    Returns:
        The counts; None where nothing says what was seen.

    Raises:
        UserError: `strict`, and some were seen, or it cannot be known.
    """
    counts = None if seen is None else seen.count(cases)
    numbers = [number for row in (counts or {}).values() for number in row.values()]
    lacking = counts is None or any(row["images"] is None for row in counts.values())
    found = any(numbers)
    total = f"{_plural(len(cases), 'image')} of {_plural(len({subject for _, subject in cases}), 'subject')}"
    told = "; ".join(f"{name} {text}" for name, text in describe(counts).items())
    sentence = f"{what}: of {total} to measure on, {told}"
    if strict and (found or lacking):
        raise UserError(
            f"{sentence}. --strict expected none. Measure on other images, use weights that "
            f"{'carry ' + FINGERPRINTS if lacking else 'have not seen them'}, or leave --strict out."
        )
    if seen != Seen():
        log.log(logging.WARNING if found or counts is None or None in numbers else logging.INFO, "%s", sentence)
    return counts


class Witness:
    """Looks at each image of an evaluation before the network does, and leaves out what the model was trained on.

    Args:
        seen: what the model has seen; None where nothing says.
        include_seen: leave nothing out.
        strict: the evaluation is refused where anything was seen, so no image goes to the network from there on.
    """

    def __init__(self, seen: Seen | None, *, include_seen: bool = False, strict: bool = False) -> None:
        self._seen, self._include_seen, self._strict = seen, include_seen, strict
        self._refused = strict and (seen is None or bool(seen.unknown))
        self._cases: list[Case] = []
        self._excluded: list[Record] = []

    def __call__(self, record: Record, volume: Volume) -> bool:
        """Whether an image is to be measured."""
        case = fingerprint(volume), record.subject
        self._cases.append(case)
        if self._seen is None or self._refused:
            return not self._refused
        trained_on = self._seen.has("finetune", case)
        self._refused = self._strict and (trained_on or self._seen.has("pretrain", case))
        if trained_on and not self._include_seen:
            self._excluded.append(record)
            return False
        return not self._refused

    def verdict(self, what: str, measured: int) -> tuple[Counts | None, dict[str, int | None]]:
        """What was seen of all images looked at, and how many were left out.

        Args:
            what: the model, for messages.
            measured: rows that came out.

        Raises:
            UserError: `strict` and something was seen; or nothing is left.
        """
        seen = guard(self._seen, self._cases, what=what, strict=self._strict)
        if not measured:
            raise UserError(
                f"{what}: expected images that it was not trained on, but it was trained on all "
                f"{len(self._excluded)}. Measure on others, or give --include-seen."
            )
        known = self._seen is not None and "finetune" not in self._seen.unknown
        subjects, images = len({record.subject for record in self._excluded}), len(self._excluded)
        return seen, {
            "excluded_seen": subjects if known else None,
            "excluded_seen_images": images if known else None,
        }


def describe(counts: Counts | None) -> dict[str, str]:
    """What was seen, for people: {"seen in pretraining": "2 images, 1 subject", ...}."""
    names = {"pretrain": "seen in pretraining", "finetune": "seen in fine-tuning"}
    if counts is None:
        return {"seen": f"not known: no {FINGERPRINTS} lies beside the weights"}
    return {name: _text(**counts[kind]) for kind, name in names.items()}


def _text(images: int | None, subjects: int | None) -> str:
    if images is None:
        return f"not known: weights that it started from carried no {FINGERPRINTS}"
    people = "subjects not known (another site key)" if subjects is None else _plural(subjects, "subject")
    return f"{_plural(images, 'image')}, {people}"


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _salted(salt: str, value: str) -> str:
    return hmac.new(bytes.fromhex(salt), value.encode(), hashlib.sha256).hexdigest()[:16]


def _kind(value: Any) -> Kind:
    kind: Kind
    for kind in get_args(Kind):
        if value == kind:
            return kind
    raise ValueError(f"kind {value!r}")


def _origin(content: dict[str, Any]) -> Origin:
    bytes.fromhex(content["salt"])
    images, subjects = frozenset(content["images"]), frozenset(content["subjects"])
    return Origin(_kind(content["kind"]), content["salt"], str(content["site"]), images, subjects)
