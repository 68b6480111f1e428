"""The images of a run: preprocessed, and split by subject."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medim.config import RunConfig, dump
from medim.data.index import Index, Record, Rejection
from medim.data.quality import Figures
from medim.data.seen import Case
from medim.data.splits import on_both_sides, split
from medim.data.store import Store, fill
from medim.files import read_json, write_json, write_text
from medim.training.trainer import versions
from medim.types import Split, Step, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cohort:
    """Preprocessed images of an index.

    Attributes:
        index: where they come from.
        store: where they lie.
        keys: image key to store key.
        splits: image key to split.
        prints: image key to fingerprint.
        overlap: how many held-out images (and subjects) have pixels that stand in the training split too.
        rejected: images that could not be read or preprocessed.
    """

    index: Index
    store: Store
    keys: dict[str, str]
    splits: dict[str, Split]
    prints: dict[str, str]
    overlap: dict[str, int]
    rejected: tuple[Rejection, ...]

    def cases(self, records: Sequence[Record]) -> list[Case]:
        """Fingerprint and subject of some images."""
        return [(self.prints[record.image], record.subject) for record in records]

    def records(self, part: Split) -> tuple[Record, ...]:
        """The usable images of a split, in the index's order."""
        return tuple(r for r in self.index.records if r.image in self.keys and self.splits[r.image] == part)

    def spec(self, config: RunConfig, *, seed: int, split_seed: int) -> dict[str, Any]:
        """What a saved network says of its input and its origin; see `medim.models.saved`."""
        return {
            "modality": config.modality,
            "spatial_dims": config.spatial_dims,
            "in_channels": self.store.entry(next(iter(self.keys.values()))).channels,
            "input_shape": list(config.views.shape),
            "encoder": config.encoder,
            "preprocessing": config.preprocessing,
            "inference": {"mode": "whole"},
            "classes": [],
            "preset": config.name,
            "provenance": {
                "config_hash": config.hash,
                "index_hash": self.index.hash,
                "seed": seed,
                "split_seed": split_seed,
                "parent": None,
                **versions(),
            },
        }

    def figures(self) -> dict[str, Figures]:
        """Image key to the figures of the image as it was read."""
        found = {image: self.store.entry(key).figures for image, key in self.keys.items()}
        return {image: figures for image, figures in found.items() if figures is not None}

    def store_keys(self, records: Sequence[Record]) -> list[str]:
        """Store keys of some images."""
        return [self.keys[record.image] for record in records]


def open_cohort(
    index: Index,
    records: Sequence[Record],
    steps: Sequence[Step],
    *,
    split_seed: int,
    store: Path | None = None,
    jobs: int = 1,
    strict: bool = False,
) -> Cohort:
    """Preprocess what the store does not hold yet, and split by subject; images with the same pixels stay together.

    Args:
        index: the images; the split is over all of them, whatever `records` asks for.
        records: those to preprocess.
        steps: preprocessing.
        split_seed: seed of the split where the source defines none.
        store: folder of the store; None is the user's cache.
        jobs: preprocessing processes.
        strict: refuse a source whose own splits put the same pixels on two sides.

    Raises:
        UserError: no image is left, the split leaves a side empty, or `strict`.
    """
    shelf = Store(store)

    def progress(done: int, total: int) -> None:
        if done == total or done % 500 == 0:
            log.info("preprocessing: %d of %d images", done, total)

    keys, failed = fill(shelf, index, records, steps, jobs=jobs, progress=progress)
    for rejection in failed:
        log.warning("%s: left out (%s: %s)", rejection.path, rejection.reason, rejection.detail)
    if not keys:
        raise UserError(
            f"none of {len(records)} images could be preprocessed; "
            f"the first says: {failed[0].detail if failed else 'no images given'}"
        )
    prints = {image: shelf.entry(key).fingerprint for image, key in keys.items()}
    splits = split(index, seed=split_seed, prints=prints)
    overlap = on_both_sides(index, splits, prints, strict=strict)
    return Cohort(index, shelf, keys, splits, prints, overlap, failed)


def write_config(out: Path, config: RunConfig, **inputs: str | float | None) -> None:
    """Write `config.yaml` and `inputs.json`, or check that the run that is taken up had the same.

    Args:
        out: the run's folder.
        config: the resolved configuration.
        **inputs: what else decides the result: seeds, the index's hash, the label budget, the encoder's hash.

    Raises:
        UserError: the folder holds a run of another configuration or other inputs.
    """
    path, text = out / "config.yaml", dump(config)
    if path.is_file() and path.read_text() != text and not _same(path, config):
        raise UserError(
            f"{path}: --resume expected the same configuration, got another. Use --overwrite to start over."
        )
    file, content = out / "inputs.json", {"schema_version": 1, **inputs}
    if file.is_file():
        other = [
            f"{key} {was} (now {content.get(key)})" for key, was in read_json(file).items() if was != content.get(key)
        ]
        if other:
            raise UserError(
                f"{file}: --resume expected the same inputs, got others; the run had {', '.join(other)}. "
                "Use --overwrite to start over."
            )
    write_text(path, text)
    write_json(file, content)


def _same(path: Path, config: RunConfig) -> bool:
    """Whether a file says the same as a configuration, but for how images are loaded, which changes no byte.

    Keys that came later than the file have their defaults.
    """
    loading = {"workers": config.workers, "prefetch": config.prefetch}
    try:
        return type(config).model_validate(yaml.safe_load(path.read_text())).model_copy(update=loading) == config
    except (ValueError, yaml.YAMLError):
        return False
