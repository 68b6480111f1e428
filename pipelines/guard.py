"""What the out-of-distribution guard of a hippocampus network tells apart: a table of docs/results.md.

For each run: AUROC of the score, images of the validation subjects against others, and the part that gets the flag.
Validation images are judged with limits from the other validation subjects. The same images, moved, are every second
validation image; boxes are cut at random from whole series, as large (in mm) as these. Beside the score, AUROC of its
features alone, of the encoder's summary alone, and of the distance to the fifth nearest training image (Sun et al.
2022, "Out-of-Distribution Detection with Deep Nearest Neighbors").

    python pipelines/guard.py --data mri-hippocampus --dicom mri-dicom --out studies/guard
        --runs studies/mri/pretrained-150-0-0 studies/mri/encoder-0 --page docs/results.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from evidence import markdown, write_section
from sklearn.metrics import roc_auc_score
from torch import nn

from medim.data.index.index import Index, build_index
from medim.data.loading.cohort import open_cohort
from medim.data.preprocessing.quality import measure
from medim.data.preprocessing.steps import preprocess
from medim.files import read_json, write_json
from medim.inference.network import infer
from medim.inference.ood import Reference, Rows, Verdict, Watch, rows_of
from medim.models.ood_features import as_watched_run
from medim.models.serialization import find, load_encoder, load_model
from medim.training.fit_ood import fit, normal, rows_of_records
from medim.types import Array, Volume

BOXES = 24  # of a series
SERIES = {"FLAIR": "boxes of FLAIR", "T2reg": "boxes of T2", "T1post": "other boxes of T1"}


def main() -> None:
    """Measure every run, write table and figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dicom", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--page", type=Path, help="where the table goes, too")
    arguments = parser.parse_args()
    index, dicom = build_index(arguments.data, "mri"), build_index(arguments.dicom, "mri")
    found = {}
    for run in arguments.runs:
        kind = find(run)[1]["kind"]
        file = arguments.out / f"{kind}.json"
        if not file.is_file():
            write_json(file, {"schema_version": 1, **measured(run, index, dicom, arguments.out / "store")})
        found[kind] = read_json(file)
    table = "\n\n".join(_table(kind, run) for kind, run in found.items())
    print(table)
    if arguments.page:
        write_section(arguments.page, "guard table", table)


def measured(run: Path, index: Index, dicom: Index, store: Path) -> dict[str, Any]:
    """Rates and AUROCs of a run's guard."""
    spec = find(run)[1]
    network = load_encoder(run) if spec["kind"] == "encoder" else load_model(run)[0]
    steps, split_seed = spec["preprocessing"], spec["provenance"]["split_seed"]
    cohort = open_cohort(index, index.records, steps, split_seed=split_seed, store=store)
    began = time.perf_counter()
    train, val = cohort.records("train"), cohort.records("val")
    rows, others = (list(rows_of_records(network, cohort, records, spec)) for records in (train, val))
    subjects, people = ([record.subject for record in records] for records in (train, val))
    reference = fit(rows, subjects, others, people)
    seconds = time.perf_counter() - began
    usual = _left_out(rows, subjects, others, people)
    flagged = {person for person, verdict in zip(people, usual, strict=True) if verdict.ood}
    encoder: Any = getattr(network, "encoder", network)
    rivals = _rivals(rows, encoder.summary_channels)
    sets: dict[str, Any] = {}
    for name, volumes in _others(index, dicom, [record.image for record in val][::2]):
        found = [_rows(volume, network, spec) for volume in volumes]
        sets[name] = _against(usual, [reference.judge(row) for row in found])
        sets[name] |= {rival: _auroc(distance(others), distance(found)) for rival, distance in rivals.items()}
        print(spec["kind"], name, sets[name], flush=True)
    return {
        "reference": {
            **reference.counts,
            "method": reference.method,
            "bytes": len(reference.dump()),
            "seconds": seconds,
        },
        "false_alarms": {
            "images": float(np.mean([verdict.ood for verdict in usual])),
            "subjects": len(flagged),
            "of_the_splits_own_limits": float(np.mean([reference.judge(row).ood for row in others])),
        },
        "others": sets,
    }


def _left_out(
    rows: Sequence[Rows], subjects: Sequence[str], others: Sequence[Rows], people: Sequence[str]
) -> list[Verdict]:
    """Each validation image, judged with limits from the other validation subjects."""
    references: dict[str, Reference] = {}
    for person in set(people):
        kept = [place for place, other in enumerate(people) if other != person]
        references[person] = fit(rows, subjects, [others[i] for i in kept], [people[i] for i in kept])
    return [references[person].judge(row) for person, row in zip(people, others, strict=True)]


def _rows(volume: Volume, network: nn.Module, spec: dict[str, Any]) -> Rows:
    watch, processed = Watch(as_watched_run(network)), preprocess(volume, spec["preprocessing"])
    infer(watch, processed, spec["inference"])
    return rows_of(measure(volume), processed, watch.watched)


def _rivals(rows: Sequence[Rows], summary: int) -> dict[str, Callable[[Sequence[Rows]], list[float]]]:
    """Other scores: a distance of images from the training images."""
    train = np.stack([row["features"] for row in rows])
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)

    def mahalanobis(count: int) -> Callable[[Sequence[Rows]], list[float]]:
        found = normal(train[:, :count], 0)
        return lambda images: [float(found.distance(row["features"][None, :count])[0]) for row in images]

    def neighbours(images: Sequence[Rows]) -> list[float]:
        return [float(np.sort(np.linalg.norm(unit - x / np.linalg.norm(x), axis=1))[4]) for x in map(_features, images)]

    return {
        "features alone": mahalanobis(train.shape[1]),
        "summary alone": mahalanobis(summary),
        "neighbours": neighbours,
    }


def _features(row: Rows) -> Array:
    return row["features"]


def _against(usual: Sequence[Verdict], others: Sequence[Verdict]) -> dict[str, Any]:
    scores = [[float(verdict.score or 0) for verdict in verdicts] for verdicts in (usual, others)]
    return {
        "images": len(others),
        "auroc": _auroc(*scores),
        "flagged": float(np.mean([verdict.ood for verdict in others])),
        "median_score": float(np.median(scores[1])),
    }


def _auroc(usual: Sequence[float], others: Sequence[float]) -> float:
    return float(roc_auc_score([0] * len(usual) + [1] * len(others), [*usual, *others]))


def _others(index: Index, dicom: Index, images: Sequence[str]) -> Iterator[tuple[str, list[Volume]]]:
    """Images that are not like those trained on, by what they are."""
    volumes = [index.open(record) for record in index.records if record.image in set(images)]
    rng = np.random.default_rng(0)
    sizes = [np.multiply(volume.shape, volume.spacing) for volume in volumes]
    for record in dicom.records:
        for part, name in SERIES.items():
            if part in record.image:
                yield name, _boxes(dicom.open(record), sizes, rng)
    for name, move in _moves(rng).items():
        yield name, [move(volume) for volume in volumes]
    crops = [dicom.open(record) for record in dicom.records if "HCropVolume" in record.image]
    yield "T1 hippocampus crops of another hospital", crops


def _moves(rng: np.random.Generator) -> dict[str, Callable[[Volume], Volume]]:
    """What is done to validation images."""
    moves: dict[str, Callable[[Volume], Volume]] = {
        "unmoved, to compare": lambda v: v,
        "noise": lambda v: v.with_array(rng.normal(v.array.mean(), v.array.std(), v.array.shape).astype(np.float32)),
        "inverted": lambda v: v.with_array(v.array.max() - v.array),
    }
    for axis, name in enumerate(("left and right", "front and back", "up and down"), start=1):
        moves[f"flipped {name}"] = partial(_flipped, axis)
    moves["two axes exchanged"] = lambda v: v.with_array(v.array.transpose(0, 1, 3, 2).copy())
    for factor in ((0.5,) * 3, (0.8,) * 3, (1.25,) * 3, (1.5,) * 3, (1.0, 1.0, 2.0)):
        text = " x ".join(f"{f:g}" for f in factor) if len(set(factor)) > 1 else f"{factor[0]:g}"
        moves[f"header says spacing x {text}"] = partial(_spaced, factor)
    return moves


def _flipped(axis: int, volume: Volume) -> Volume:
    return volume.with_array(np.flip(volume.array, axis).copy())


def _spaced(factor: Sequence[float], volume: Volume) -> Volume:
    affine = volume.affine @ np.diag([*factor, 1.0])
    return Volume(volume.array, affine, affine, volume.native_shape)


def _boxes(volume: Volume, sizes: Sequence[Array], rng: np.random.Generator) -> list[Volume]:
    """Boxes of a series that are at least half head."""
    bright = volume.array > 0.15 * np.percentile(volume.array, 99)
    boxes: list[Volume] = []
    while len(boxes) < BOXES:
        shape = np.minimum(np.rint(sizes[len(boxes) % len(sizes)] / volume.spacing), volume.shape).astype(int)
        start = rng.integers(0, np.subtract(volume.shape, shape) + 1)
        box = (slice(None), *(slice(a, a + n) for a, n in zip(start, shape, strict=True)))
        if bright[box].mean() < 0.5:
            continue
        affine = volume.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start
        boxes.append(Volume(volume.array[box].copy(), affine, affine, tuple(shape.tolist())))
    return boxes


def _table(kind: str, run: dict[str, Any]) -> str:
    head = [kind, "images", "AUROC", "features alone", "summary alone", "neighbours", "flagged"]
    rows = []
    for name, other in run["others"].items():
        figures = [f"{other[key]:.3f}" for key in ("auroc", "features alone", "summary alone", "neighbours")]
        rows.append([name, str(other["images"]), *figures, f"{100 * other['flagged']:.0f} %"])
    count, alarms = run["reference"]["held_out_images"], run["false_alarms"]["images"]
    rows.append(["*validation images, limits from the others*", str(count), "", "", "", "", f"{100 * alarms:.1f} %"])
    return markdown(head, rows)


if __name__ == "__main__":
    main()
