"""Probe a frozen encoder: what do its features tell with a simple classifier and few labels?

Features are computed once. Each label budget is drawn with several seeds, and every arm (the encoder, its architecture
untrained, the pixels) sees the very same subsets: arms, encoders and protocols can be paired by budget and seed.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from medim.data.contamination import Counts, guard, read_seen
from medim.data.index.index import Index, Record
from medim.evaluation.cases import write_parquet
from medim.evaluation.probing.baselines import fresh_encoder, principal_components
from medim.evaluation.probing.classifiers import PROTOCOLS, Answer
from medim.evaluation.probing.label_budget import Budget, Sample, draw, groups_of, open_sample
from medim.files import fresh_folder, hash_of, write_json
from medim.metrics.classification import classification_metrics
from medim.metrics.representation import extract, stacked
from medim.models.serialization import find, load_encoder
from medim.types import Array, UsageError, UserError

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
METRICS = ("auroc", "average_precision", "accuracy", "balanced_accuracy", "f1", "ece")
Row = dict[str, Any]


def probe(
    encoder: Path,
    index: Index,
    out: Path,
    *,
    protocol: str = "linear",
    budgets: Sequence[Budget] = (Budget(fraction=1.0),),
    seeds: Sequence[int] = (0,),
    maps: Sequence[int] | None = None,
    split_seed: int = 0,
    anchors: bool = True,
    overwrite: bool = False,
    store: Path | None = None,
    strict: bool = False,
    sample: Sample | None = None,
) -> dict[str, Any]:
    """Measure a frozen encoder on the validation split, with label budgets of the training split.

    A row is one classifier: features, budget and seed. Rows of one budget and seed have the same labelled images,
    whatever the features, the protocol and the encoder (`subset` is their hash). A budget that takes every labelled
    image has one subset, and is measured with the first seed alone.

    Args:
        encoder: a pretraining run or its package.
        index: the images, some of them labelled.
        out: folder for `cases.parquet` and, last, `probe.json`.
        protocol: an entry of `PROTOCOLS`.
        budgets: how many labels.
        seeds: of the label subsets, of the protocol, and of the weights of the untrained encoder.
        maps: levels whose mean and maximum join the summary; None: all.
        split_seed: of the split by subject.
        anchors: measure the untrained encoder (`random`) and the pixels too.
        overwrite: empty `out` first.
        store: folder of preprocessed images; None is the user's cache.
        strict: refuse where the encoder, or the training split, holds an image or subject of the validation split.
        sample: the images where they are open already; then neither `store` nor the split is looked at.

    Returns:
        The content of `probe.json`: `rows`, their `summary`, and what they stand on. Probabilities of each validation
        image are in `cases.parquet`.

    Raises:
        UserError: no encoder, no labels, a class without a label in some budget, a non-empty `out`, or
            `strict`.
        UsageError: an unknown protocol or map, or a budget out of range.
    """
    spec = _encoder_spec(encoder)
    network: Any = load_encoder(encoder).to(_device())
    levels = _levels(maps, len(network.channels))
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol {protocol}: expected one of {', '.join(PROTOCOLS)}.")
    images = sample or open_sample(index, spec, split_seed=split_seed, store=store, strict=strict)
    seen = guard(read_seen(encoder), images.cases, what=f"encoder {encoder}", strict=strict)
    subsets = draw(images, budgets, seeds)
    fresh_folder(out, overwrite=overwrite)
    arms = _arms(network, spec, images, levels, [seed for _, seed in subsets], anchors=anchors)
    rows, cases = _measure(protocol, arms, subsets, images)
    content = {
        "schema_version": SCHEMA_VERSION,
        "command": "probe",
        "protocol": protocol,
        "encoder_sha256": spec["sha256"],
        "maps": levels,
        **_measured_on(images, seen),
        "split_seed": split_seed,
        "index_hash": index.hash,
        "rows": rows,
        "summary": summarise(rows),
    }
    write_parquet(out / "cases.parquet", pa.concat_tables(cases))
    write_json(out / "probe.json", content)
    return content


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over the subsets (None where there is one), by features and budget."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["features"], row["budget"]].append(row)
    return [
        {
            "features": features,
            "budget": name,
            "subsets": len(group),
            **{metric: _spread([r[metric] for r in group if r[metric] is not None]) for metric in METRICS},
        }
        for (features, name), group in groups.items()
    ]


def _arms(
    encoder: Any, spec: dict[str, Any], images: Sample, maps: Sequence[int], seeds: Sequence[int], *, anchors: bool
) -> Iterator[tuple[str, Sequence[int], Array]]:
    """Name, the seeds it is for, and features (N, d) of the images used."""

    def features(network: Any) -> Array:
        """Features (N, d) of the images used.

        Raises:
            UserError: the network does not take images of their size.
        """
        batches = stacked(volume.array for volume in images.volumes(images.used))
        try:
            return extract(network, batches, maps=maps)
        except RuntimeError as error:
            raise UserError(
                f"encoder: expected one that takes whole preprocessed images, got an error from it ({error}). It was "
                f"trained on {spec['input_shape']}; pretrain with a preprocessing that ends in that shape (pad_or_crop "
                "or resize), or with summary: mean_max."
            ) from error

    yield "encoder", seeds, features(encoder)
    if anchors:
        for seed in dict.fromkeys(seeds):
            fresh = fresh_encoder(spec, images.volumes(images.train), seed=seed, device=_device())
            yield "random", [seed], features(fresh)
        volumes = images.volumes(images.train), images.volumes(images.used)
        yield "pixels", seeds, principal_components(*volumes, shape=spec["input_shape"])


def _measure(
    protocol: str,
    arms: Iterator[tuple[str, Sequence[int], Array]],
    subsets: Mapping[tuple[Budget, int], Sequence[Record]],
    images: Sample,
) -> tuple[list[Row], list[pa.Table]]:
    """A row, and the cases it stands on, for each arm, budget and seed."""
    rows, cases = [], []
    for name, seeds, features in arms:
        log.info("%s: %d features of %d images", name, features.shape[1], len(features))
        for (chosen, seed), subset in subsets.items():
            if seed in seeds:
                answer = _answer(protocol, features, images, subset, seed)
                keys = {"features": name, "budget": chosen.name, "seed": seed}
                rows.append({**keys, **_row(protocol, chosen, subset, answer, images)})
                cases.append(_cases(keys, answer, images))
    return rows, cases


def _answer(protocol: str, features: Array, images: Sample, subset: Sequence[Record], seed: int) -> Answer:
    chosen = {record.image for record in subset}
    places = [place for place, record in enumerate(images.labelled) if record.image in chosen]
    x, rest = features[places], features[len(images.labelled) :]
    return PROTOCOLS[protocol](x, images.targets(subset), rest, seed=seed, groups=groups_of(subset))


def _row(protocol: str, chosen: Budget, subset: Sequence[Record], answer: Answer, images: Sample) -> Row:
    return {
        "protocol": protocol,
        "labelled": chosen.labelled,
        "fraction": chosen.fraction,
        "n_labelled": len(subset),
        "subset": hash_of([record.image for record in subset])[:12],
        **classification_metrics(answer.probabilities, images.targets(images.val)),
        **answer.settings,
    }


def _cases(keys: dict[str, Any], answer: Answer, images: Sample) -> pa.Table:
    columns: dict[str, Any] = {
        name: [getattr(record, name) for record in images.val] for name in ("image", "subject", "label")
    }
    columns |= {name: [value] * len(images.val) for name, value in keys.items()}
    columns |= {f"probability_{name}": answer.probabilities[:, k] for k, name in enumerate(images.classes)}
    return pa.table(columns)


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)) if values else None, "sd": sd}


def _measured_on(images: Sample, seen: Counts | None) -> dict[str, Any]:
    return {
        "classes": list(images.classes),
        "n": len(images.val),
        "subjects": len({record.subject for record in images.val}),
        "seen": seen,
        "overlap": images.overlap,
        "rejected": images.rejected,
        "split": "val",
    }


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _encoder_spec(path: Path) -> dict[str, Any]:
    spec = find(path)[1]
    if spec["kind"] != "encoder":
        raise UserError(
            f"{path}: expected a pretrained encoder, got a {spec['kind']}, which was trained on labels: a probe of it "
            "would not tell what pretraining gave. Give the run that it started from, or use `medim evaluate`."
        )
    return spec


def _levels(maps: Sequence[int] | None, count: int) -> list[int]:
    wrong = [level for level in maps or () if not 0 <= level < count]
    if wrong:
        raise UsageError(f"--map {wrong[0]}: expected a level from 0 (finest) to {count - 1}, which the encoder has.")
    return list(range(count)) if maps is None else sorted(set(maps))
