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

from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import ImageRecord
from medim.files import encode_json, read_json, write_bytes
from medim.privacy import make_pseudonym
from medim.types import UserError, Volume

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FINGERPRINTS_FILE = "fingerprints.json"
TrainingKind = Literal["pretrain", "finetune"]
CaseIdentity = tuple[str, str]  # fingerprint and subject of an image
ContaminationCounts = dict[
    str, dict[str, int | None]
]  # kind: {"images": ..., "subjects": ...}; None where it is not known


@dataclass(frozen=True)
class TrainingSet:
    """A training that the weights went through.

    Attributes:
        kind: without labels (pretrain) or with them (finetune).
        salt: of this training, random.
        site: stands for the site key that the subjects are under.
        images: salted fingerprints.
        subjects: salted pseudonyms.
    """

    kind: TrainingKind
    salt: str
    site: str
    images: frozenset[str]
    subjects: frozenset[str]

    @classmethod
    def from_cases(cls, kind: TrainingKind, cases: Iterable[CaseIdentity]) -> TrainingSet:
        """The record of a training on some images, under a new salt."""
        salt, cases = secrets.token_hex(16), list(cases)
        images = frozenset(_hash_with_salt(salt, fingerprint) for fingerprint, _ in cases if fingerprint)
        people = frozenset(_hash_with_salt(salt, subject) for _, subject in cases)
        return cls(kind, salt, _hash_with_salt(salt, make_pseudonym("site")), images, people)

    @property
    def same_site(self) -> bool:
        """Whether its subjects are under this site's key."""
        return self.site == _hash_with_salt(self.salt, make_pseudonym("site"))

    def has_image(self, fingerprint: str) -> bool:
        """Whether it saw an image with these pixels."""
        return bool(fingerprint) and _hash_with_salt(self.salt, fingerprint) in self.images

    def has_subject(self, subject: str) -> bool:
        """Whether it saw this subject; no subject is known from another site."""
        return self.same_site and _hash_with_salt(self.salt, subject) in self.subjects


@dataclass(frozen=True)
class TrainingHistory:
    """All trainings that the weights went through; none for fresh weights.

    Attributes:
        training_sets: what each saw.
        unknown_kinds: kinds of training that happened before, without a record.
    """

    training_sets: tuple[TrainingSet, ...] = ()
    unknown_kinds: tuple[TrainingKind, ...] = ()

    def contains(self, kind: TrainingKind, case: CaseIdentity) -> bool:
        """Whether an image, or its subject, was seen in trainings of a kind."""
        image, subject = case
        return any(o.has_image(image) or o.has_subject(subject) for o in self.training_sets if o.kind == kind)

    def count_cases(self, cases: Sequence[CaseIdentity]) -> ContaminationCounts:
        """How many of some images, and of their subjects, each kind of training has seen."""
        counts: ContaminationCounts = {}
        for kind in get_args(TrainingKind):
            training_sets = [origin for origin in self.training_sets if origin.kind == kind]
            has_record = kind not in self.unknown_kinds
            images = sum(any(o.has_image(image) for o in training_sets) for image, _ in cases)
            people = sum(
                any(o.has_subject(person) for o in training_sets) for person in {subject for _, subject in cases}
            )
            all_same_site = has_record and all(origin.same_site for origin in training_sets)
            counts[kind] = {"images": images if has_record else None, "subjects": people if all_same_site else None}
        return counts

    def extended(self, kind: TrainingKind, cases: Iterable[CaseIdentity]) -> TrainingHistory:
        """The record after one more training."""
        return TrainingHistory((*self.training_sets, TrainingSet.from_cases(kind, cases)), self.unknown_kinds)

    def dump(self) -> bytes:
        """The content of `fingerprints.json`."""
        entries = [
            {
                "kind": training_set.kind,
                "salt": training_set.salt,
                "site": training_set.site,
                "images": sorted(training_set.images),
                "subjects": sorted(training_set.subjects),
            }
            for training_set in self.training_sets
        ]
        return encode_json({"schema_version": SCHEMA_VERSION, "origins": entries, "unknown": list(self.unknown_kinds)})

    def write(self, folder: Path) -> None:
        """Write `fingerprints.json`."""
        write_bytes(folder / FINGERPRINTS_FILE, self.dump())


def load_training_history(path: Path) -> TrainingHistory | None:
    """What the weights of a run, of its `encoder/` or `model/`, or of a package have seen; None where none says.

    Raises:
        UserError: the file is damaged or of another schema.
    """
    folders = (path, path / "model", path / "encoder")
    file = next((folder / FINGERPRINTS_FILE for folder in folders if (folder / FINGERPRINTS_FILE).is_file()), None)
    if file is None:
        return None
    content = read_json(file)
    try:
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}")
        return TrainingHistory(
            tuple(_parse_training_set(entry) for entry in content["origins"]),
            tuple(_parse_kind(k) for k in content["unknown"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: expected fingerprints of schema version {SCHEMA_VERSION}, got something else "
            f"({type(error).__name__}: {error}). Copy the folder again."
        ) from error


def check_contamination(
    history: TrainingHistory | None, cases: Sequence[CaseIdentity], *, weights_name: str, strict: bool = False
) -> ContaminationCounts | None:
    """Say how many of the images to measure on were seen, and with `strict` refuse where any was.

    Args:
        history: what `load_training_history` found.
        cases: the images to measure on.
        weights_name: the weights, for messages.
        strict: refuse.

    Returns:
        The counts; None where nothing says what was seen.

    Raises:
        UserError: `strict`, and some were seen, or it cannot be known.
    """
    counts = None if history is None else history.count_cases(cases)
    numbers = [number for row in (counts or {}).values() for number in row.values()]
    is_incomplete = counts is None or any(row["images"] is None for row in counts.values())
    has_overlap = any(numbers)
    subjects = {subject for _, subject in cases}
    total = f"{_pluralise_noun(len(cases), 'image')} of {_pluralise_noun(len(subjects), 'subject')}"
    summary = "; ".join(f"{name} {text}" for name, text in describe_counts(counts).items())
    sentence = f"{weights_name}: of {total} to measure on, {summary}"
    if strict and (has_overlap or is_incomplete):
        raise UserError(
            f"{sentence}. --fail-on-contamination expected none. Measure on other images, use weights that "
            f"{'carry ' + FINGERPRINTS_FILE if is_incomplete else 'have not seen them'}, or leave this option out."
        )
    if history != TrainingHistory():
        log.log(logging.WARNING if has_overlap or counts is None or None in numbers else logging.INFO, "%s", sentence)
    return counts


class ContaminationFilter:
    """Looks at each image of an evaluation before the network does, and leaves out what the model was trained on.

    Args:
        history: what the model has seen; None where nothing says.
        include_seen: leave nothing out.
        strict: the evaluation is refused where anything was seen, so no image goes to the network from there on.
    """

    def __init__(self, history: TrainingHistory | None, *, include_seen: bool = False, strict: bool = False) -> None:
        self._history, self._include_seen, self._strict = history, include_seen, strict
        self._is_refused = strict and (history is None or bool(history.unknown_kinds))
        self._cases: list[CaseIdentity] = []
        self._excluded_records: list[ImageRecord] = []

    def __call__(self, record: ImageRecord, volume: Volume) -> bool:
        """Whether an image is to be measured."""
        case = compute_fingerprint(volume), record.subject
        self._cases.append(case)
        if self._history is None or self._is_refused:
            return not self._is_refused
        in_finetuning = self._history.contains("finetune", case)
        self._is_refused = self._strict and (in_finetuning or self._history.contains("pretrain", case))
        if in_finetuning and not self._include_seen:
            self._excluded_records.append(record)
            return False
        return not self._is_refused

    def result(self, model_name: str, n_rows: int) -> tuple[ContaminationCounts | None, dict[str, int | None]]:
        """What was seen of all images looked at, and how many were left out.

        Args:
            model_name: the model, for messages.
            n_rows: rows that came out.

        Raises:
            UserError: `strict` and something was seen; or nothing is left.
        """
        counts = check_contamination(self._history, self._cases, weights_name=model_name, strict=self._strict)
        if not n_rows:
            raise UserError(
                f"{model_name}: expected images that it was not trained on, but it was trained on all "
                f"{len(self._excluded_records)}. Measure on others, or give --include-training-subjects."
            )
        is_complete = self._history is not None and "finetune" not in self._history.unknown_kinds
        subjects, images = len({record.subject for record in self._excluded_records}), len(self._excluded_records)
        return counts, {
            "excluded_seen": subjects if is_complete else None,
            "excluded_seen_images": images if is_complete else None,
        }


def describe_counts(counts: ContaminationCounts | None) -> dict[str, str]:
    """What was seen, for people: {"seen in pretraining": "2 images, 1 subject", ...}."""
    names = {"pretrain": "seen in pretraining", "finetune": "seen in fine-tuning"}
    if counts is None:
        return {"seen": f"not known: no {FINGERPRINTS_FILE} lies beside the weights"}
    return {name: _format_counts(**counts[kind]) for kind, name in names.items()}


def _format_counts(images: int | None, subjects: int | None) -> str:
    if images is None:
        return f"not known: weights that it started from carried no {FINGERPRINTS_FILE}"
    people = "subjects not known (another site key)" if subjects is None else _pluralise_noun(subjects, "subject")
    return f"{_pluralise_noun(images, 'image')}, {people}"


def _pluralise_noun(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _hash_with_salt(salt: str, value: str) -> str:
    return hmac.new(bytes.fromhex(salt), value.encode(), hashlib.sha256).hexdigest()[:16]


def _parse_kind(value: Any) -> TrainingKind:
    kind: TrainingKind
    for kind in get_args(TrainingKind):
        if value == kind:
            return kind
    raise ValueError(f"kind {value!r}")


def _parse_training_set(content: dict[str, Any]) -> TrainingSet:
    bytes.fromhex(content["salt"])
    images, subjects = frozenset(content["images"]), frozenset(content["subjects"])
    return TrainingSet(_parse_kind(content["kind"]), content["salt"], str(content["site"]), images, subjects)
