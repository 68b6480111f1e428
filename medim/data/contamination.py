"""Record the training images of an encoder or a model, and detect them in later evaluations.

The record, `fingerprints.json`, is stored with the weights and in the package. Every entry is an HMAC-SHA256 under a
salt of its own training. The file can therefore only be used to test whether a given image was in the training set; it
reveals no subjects, and two files cannot be compared. Images are recognised at any site, subjects only at the site
whose key made their pseudonyms.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import secrets
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from typing_extensions import TypedDict  # pydantic needs this form before Python 3.12

from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import ImageRecord
from medim.files import encode_json, read_json, write_bytes
from medim.privacy import make_pseudonym
from medim.types import UserError, Volume

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FINGERPRINTS_FILE = "fingerprints.json"
TrainingKind = Literal["pretrain", "finetune"]
_KIND_NOUNS: dict[TrainingKind, str] = {"pretrain": "pretraining", "finetune": "fine-tuning"}
CaseIdentity = tuple[str, str]  # fingerprint and subject of an image


class ContaminationEntry(TypedDict):
    """Numbers of images and subjects in one kind of training; None if unknown."""

    images: int | None
    subjects: int | None


class ContaminationCounts(TypedDict):
    """Numbers of images and subjects in the training data of a network."""

    pretrain: ContaminationEntry
    finetune: ContaminationEntry


class TrainingSetEntry(TypedDict):
    """A training set in `fingerprints.json`; see `TrainingSet`."""

    kind: str
    salt: str
    site: str
    images: list[str]
    subjects: list[str]


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Images and subjects of one training of the weights.

    Attributes:
        kind: training without labels (pretrain) or with labels (finetune).
        salt: random salt of this training.
        site: hash of the site key that the subject pseudonyms depend on.
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
        """Build the record of a training on some images, with a new salt."""
        salt, cases = secrets.token_hex(16), list(cases)
        images = frozenset(_hash_with_salt(salt, fingerprint) for fingerprint, _ in cases if fingerprint)
        subjects = frozenset(_hash_with_salt(salt, subject) for _, subject in cases)
        return cls(
            kind=kind, salt=salt, site=_hash_with_salt(salt, make_pseudonym("site")), images=images, subjects=subjects
        )

    @property
    def same_site(self) -> bool:
        """Whether the subject pseudonyms use the key of this site."""
        return self.site == _hash_with_salt(self.salt, make_pseudonym("site"))

    def has_image(self, fingerprint: str) -> bool:
        """Whether an image with these pixels was in the training set."""
        return bool(fingerprint) and _hash_with_salt(self.salt, fingerprint) in self.images

    def has_subject(self, subject: str) -> bool:
        """Whether this subject was in the training set; always False for a record of another site."""
        return self.same_site and _hash_with_salt(self.salt, subject) in self.subjects


@dataclass(frozen=True)
class TrainingHistory:
    """All trainings of the weights; empty for newly initialised weights.

    Attributes:
        training_sets: one record per training.
        unknown_kinds: kinds of earlier training that have no record.
    """

    training_sets: tuple[TrainingSet, ...] = ()
    unknown_kinds: tuple[TrainingKind, ...] = ()

    def contains(self, kind: TrainingKind, case: CaseIdentity) -> bool:
        """Whether an image or its subject was in a training set of this kind."""
        image, subject = case
        return any(o.has_image(image) or o.has_subject(subject) for o in self.training_sets if o.kind == kind)

    def count_cases(self, cases: Sequence[CaseIdentity]) -> ContaminationCounts:
        """Count the images, and their subjects, that were in the training sets of each kind."""

        def count_kind(kind: TrainingKind) -> ContaminationEntry:
            """Count for one kind."""
            training_sets = [origin for origin in self.training_sets if origin.kind == kind]
            has_record = kind not in self.unknown_kinds
            images = sum(any(o.has_image(image) for o in training_sets) for image, _ in cases)
            n_subjects = sum(
                any(o.has_subject(subject) for o in training_sets) for subject in {subject for _, subject in cases}
            )
            all_same_site = has_record and all(origin.same_site for origin in training_sets)
            return {"images": images if has_record else None, "subjects": n_subjects if all_same_site else None}

        return {"pretrain": count_kind("pretrain"), "finetune": count_kind("finetune")}

    def extended(self, kind: TrainingKind, cases: Iterable[CaseIdentity]) -> TrainingHistory:
        """Return the history with one more training."""
        return TrainingHistory((*self.training_sets, TrainingSet.from_cases(kind, cases)), self.unknown_kinds)

    def dump(self) -> bytes:
        """Encode the content of `fingerprints.json`."""
        entries: list[TrainingSetEntry] = [
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
    """Load the training history of a run, its `encoder/` or `model/`, or a package; None if there is no record.

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
            f"{file}: expected fingerprints of schema version {SCHEMA_VERSION}, got an invalid file "
            f"({type(error).__name__}: {error}). Copy the folder again."
        ) from error


def check_contamination(
    history: TrainingHistory | None,
    cases: Sequence[CaseIdentity],
    *,
    weights_name: str,
    fail_on_contamination: bool = False,
    excluded_kinds: Collection[TrainingKind] = (),
) -> ContaminationCounts | None:
    """Count evaluation images that were used in training, and log the counts.

    Args:
        history: result of `load_training_history`.
        cases: images of the evaluation.
        weights_name: name of the weights, for messages.
        fail_on_contamination: raise an error if an image or subject was used in training, or if this is unknown.
        excluded_kinds: kinds of training whose images are not evaluated.

    Returns:
        The counts; None if there is no training history.

    Raises:
        UserError: `fail_on_contamination`, and there is an overlap or the history is incomplete.
    """
    counts = None if history is None else history.count_cases(cases)
    is_incomplete = counts is None or None in (counts["pretrain"]["images"], counts["finetune"]["images"])
    numbers = list_counts(counts)
    has_overlap = any(numbers)
    subjects = {subject for _, subject in cases}
    total = f"{_pluralise_noun(len(cases), 'image')} of {_pluralise_noun(len(subjects), 'subject')}"
    summary = "; ".join(f"{name} {text}" for name, text in describe_counts(counts).items())
    sentence = f"{weights_name}: of {total} in the evaluation, {summary}"
    leaks = [] if counts is None else _describe_leaks(counts, len(cases), len(subjects), excluded_kinds)
    if fail_on_contamination and (has_overlap or is_incomplete):
        raise UserError(
            f"{sentence}. --fail-on-contamination allows none. Evaluate on other images, use weights "
            f"{'with ' + FINGERPRINTS_FILE if is_incomplete else 'trained without them'}, or omit this option."
        )
    if history == TrainingHistory():
        return counts
    for leak in leaks:
        log.warning("%s", leak)
    if None in numbers:
        log.warning("WARNING leakage unknown: %s", sentence)
    elif not leaks:
        log.info("Leakage check: none of %s was used to train the %s", total, weights_name)
    return counts


def _describe_leaks(
    counts: ContaminationCounts, n_images: int, n_subjects: int, excluded_kinds: Collection[TrainingKind]
) -> list[str]:
    """Describe the evaluation images, or other images of their subjects, that were used in a training."""
    leaks = []
    kinds: dict[TrainingKind, ContaminationEntry] = {"pretrain": counts["pretrain"], "finetune": counts["finetune"]}
    for kind, entry in kinds.items():
        images, subjects = entry["images"] or 0, entry["subjects"]
        if images:
            text = f"{images} of {_pluralise_noun(n_images, 'evaluation image')} ({images / n_images:.0%}) "
            text += f"{'was' if images == 1 else 'were'} used in {_KIND_NOUNS[kind]} ("
            text += f"{subjects} of {_pluralise_noun(n_subjects, 'subject')})" if subjects else "recognised by pixels; "
            text += "" if subjects else f"subject IDs {'unknown' if subjects is None else 'differ'})"
        elif subjects:
            text = f"other images of {subjects} of {_pluralise_noun(n_subjects, 'evaluation subject')} were used in "
            text += _KIND_NOUNS[kind]
        else:
            continue
        consequence = "They are left out" if kind in excluded_kinds else "Results are too good"
        leaks.append(f"WARNING leakage: {text}. {consequence}. --fail-on-contamination refuses them")
    return leaks


class ContaminationFilter:
    """Filter of evaluation images: excludes those that the model was trained on, before they reach the network.

    Args:
        history: training history of the model; None if unknown.
        include_training_subjects: exclude no images.
        fail_on_contamination: reject the evaluation if any image or subject was used in training; the network receives
            no image after the first match.
    """

    def __init__(
        self,
        history: TrainingHistory | None,
        *,
        include_training_subjects: bool = False,
        fail_on_contamination: bool = False,
    ) -> None:
        self._history = history
        self._include_training_subjects = include_training_subjects
        self._fail_on_contamination = fail_on_contamination
        self._is_refused = fail_on_contamination and (history is None or bool(history.unknown_kinds))
        self._cases: list[CaseIdentity] = []
        self._excluded_records: list[ImageRecord] = []

    def __call__(self, record: ImageRecord, volume: Volume) -> bool:
        """Whether to evaluate an image."""
        case = compute_fingerprint(volume), record.subject
        self._cases.append(case)
        if self._history is None or self._is_refused:
            return not self._is_refused
        in_finetuning = self._history.contains("finetune", case)
        self._is_refused = self._fail_on_contamination and (in_finetuning or self._history.contains("pretrain", case))
        if in_finetuning and not self._include_training_subjects:
            self._excluded_records.append(record)
            return False
        return not self._is_refused

    def result(self, model_name: str, n_rows: int) -> tuple[ContaminationCounts | None, dict[str, int | None]]:
        """Return the counts of images used in training, and the numbers of excluded subjects and images.

        Args:
            model_name: name of the model, for messages.
            n_rows: number of evaluated images.

        Raises:
            UserError: `fail_on_contamination`, and there was an overlap; or no image remains.
        """
        excluded_kinds: tuple[TrainingKind, ...] = () if self._include_training_subjects else ("finetune",)
        counts = check_contamination(
            self._history,
            self._cases,
            weights_name=model_name,
            fail_on_contamination=self._fail_on_contamination,
            excluded_kinds=excluded_kinds,
        )
        if not n_rows:
            raise UserError(
                f"{model_name}: no image remains for the evaluation; the model was trained on all "
                f"{len(self._excluded_records)}. Use other images, or give --include-training-subjects."
            )
        is_complete = self._history is not None and "finetune" not in self._history.unknown_kinds
        subjects, images = len({record.subject for record in self._excluded_records}), len(self._excluded_records)
        return counts, {
            "n_excluded_subjects": subjects if is_complete else None,
            "n_excluded_images": images if is_complete else None,
        }


def list_counts(counts: ContaminationCounts | None) -> list[int | None]:
    """List the numbers of images and subjects of both kinds of training; None for each unknown number."""
    if counts is None:
        return [None]
    return [
        number for kind in (counts["pretrain"], counts["finetune"]) for number in (kind["images"], kind["subjects"])
    ]


def describe_counts(counts: ContaminationCounts | None) -> dict[str, str]:
    """Format the counts for display: {"seen in pretraining": "2 images, 1 subject", ...}."""
    if counts is None:
        return {"seen": f"unknown: the weights have no {FINGERPRINTS_FILE}"}
    return {
        "seen in pretraining": _format_counts(**counts["pretrain"]),
        "seen in fine-tuning": _format_counts(**counts["finetune"]),
    }


def _format_counts(images: int | None, subjects: int | None) -> str:
    if images is None:
        return f"unknown: the initial weights had no {FINGERPRINTS_FILE}"
    if images and subjects == 0:
        return f"{_pluralise_noun(images, 'image')} (subject IDs differ)"
    subject_text = "subjects unknown (another site key)" if subjects is None else _pluralise_noun(subjects, "subject")
    return f"{_pluralise_noun(images, 'image')}, {subject_text}"


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


def _parse_digests(values: object) -> frozenset[str]:
    """Check and convert the salted digests of images or subjects."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("expected lists of texts as images and subjects")
    return frozenset(values)


def _parse_training_set(content: TrainingSetEntry) -> TrainingSet:
    bytes.fromhex(content["salt"])
    images, subjects = _parse_digests(content["images"]), _parse_digests(content["subjects"])
    return TrainingSet(
        kind=_parse_kind(content["kind"]),
        salt=content["salt"],
        site=str(content["site"]),
        images=images,
        subjects=subjects,
    )
