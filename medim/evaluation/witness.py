"""Has the model seen what it is measured on? Asked of every image as it is read."""

from __future__ import annotations

from medim.data.fingerprints import fingerprint
from medim.data.index import Record
from medim.data.seen import Case, Counts, Seen, guard
from medim.types import UserError, Volume


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
