from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from medim.data.contamination import TrainingHistory
from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import Index, build_index
from medim.data.loading.splits import assign_splits
from medim.evaluation.evaluate import open_encoder
from medim.evaluation.probing.classifiers import knn_probe
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import ProbeOptions, probe, summarise_probes
from medim.files import read_json
from medim.metrics import compute_metrics, list_metrics
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from medim.types import UsageError, UserError
from tests.evaluation.conftest import make_run
from tests.specs import make_spec

CONVNET: dict[str, Any] = {"name": "convnet", "channels": [4, 8], "kernel_size": 3, "hidden": 0}
SPEC: dict[str, Any] = {
    "kind": "encoder",
    "modality": "xray",
    "spatial_dims": 2,
    "in_channels": 1,
    "input_shape": [16, 16],
    "encoder": {**CONVNET, "summary": "mean_max", "summary_channels": 4},
    "preprocessing": [{"op": "normalise", "method": "zscore"}],
    "inference": {"mode": "whole"},
    "classes": [],
}


def make_encoder(folder: Path, spec: dict[str, Any] = SPEC, weight: Callable[[Any], None] | None = None) -> Path:
    """A pretraining run with fresh weights."""
    torch.manual_seed(0)
    encoder = build_encoder(make_spec(spec))
    if weight:
        weight(encoder)
    save_model(folder / "encoder", "encoder", encoder, make_spec(spec))
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """Sixty X-rays of 16x16: upright and lying stripes among noise, 40 for training and 20 for validation."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("val", 20)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 90, (count, 16, 16))
        for image, label in zip(images, labels, strict=True):
            stripe = int(rng.integers(2, 12))
            (image if label else image.T)[stripe : stripe + 3] += 120
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": labels[:, None]}
    arrays |= {f"test_{kind}": arrays[f"val_{kind}"][:0] for kind in ("images", "labels")}
    path = tmp_path_factory.mktemp("xray") / "stripes.npz"
    np.savez(path, **arrays)
    return build_index(path, "xray")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("runs") / "run")


def test_every_arm_has_a_row_for_each_budget_and_seed_and_its_cases_give_its_metrics(
    run: Path, index: Index, tmp_path: Path
) -> None:
    budgets = [Budget(labelled=10), Budget(fraction=1.0)]
    found = probe(run, index, tmp_path / "out", ProbeOptions(budgets=budgets, seeds=range(2)))
    assert found == read_json(tmp_path / "out" / "probe.json")
    assert [(r["features"], r["budget"], r["seed"]) for r in found["rows"]] == [
        *[("encoder", "10", 0), ("encoder", "10", 1), ("encoder", "100%", 0)],
        *[("random", "10", 0), ("random", "100%", 0), ("random", "10", 1)],
        *[("pixels", "10", 0), ("pixels", "10", 1), ("pixels", "100%", 0)],
    ]
    assert (found["n"], found["levels"], found["classes"], found["contamination"]) == (20, [0, 1], ["0", "1"], None)
    table = pq.read_table(tmp_path / "out" / "cases.parquet")
    assert table.schema.metadata[b"schema_version"] == b"1"
    rows = table.to_pylist()
    assert len(rows) == 9 * 20
    for row in found["rows"]:
        mine = [c for c in rows if all(c[key] == row[key] for key in ("features", "budget", "seed"))]
        probabilities = np.array([[c["probability_0"], c["probability_1"]] for c in mine])
        metrics = compute_metrics("classification", probabilities, np.array([int(c["label"]) for c in mine]))
        assert {key: row[key] for key in list_metrics("classification")} == metrics


def test_rows_of_one_budget_and_seed_have_the_same_labels_whatever_else_differs(
    run: Path, index: Index, tmp_path: Path
) -> None:
    budgets = [Budget(labelled=10), Budget(fraction=0.5)]
    found = [
        *probe(run, index, tmp_path / "a", ProbeOptions(budgets=budgets, seeds=range(2)))["rows"],
        *probe(
            run, index, tmp_path / "b", ProbeOptions(budgets=budgets, seeds=[1, 0], protocol="knn", baselines=False)
        )["rows"],
    ]
    subsets = {(row["budget"], row["seed"]): row["subset"] for row in found}
    assert len(found) == 12 + 4
    assert len(set(subsets.values())) == len(subsets) == 4
    assert all(row["subset"] == subsets[row["budget"], row["seed"]] for row in found)
    assert {(row["budget"], row["n_labelled"]) for row in found} == {("10", 10), ("50%", 20)}
    assert {row["protocol"]: row.get("k") for row in found} == {"linear": None, "knn": 20}


def test_the_probe_tells_what_the_features_tell(index: Index, tmp_path: Path) -> None:
    """An encoder that answers with nothing is at chance; stripes are easy for one that looks along an axis."""

    def blind(encoder: Any) -> None:
        for parameter in encoder.parameters():
            torch.nn.init.zeros_(parameter)

    def upright(encoder: Any) -> None:
        kernel = encoder.stages[0][0].weight
        with torch.no_grad():
            kernel.zero_()
            kernel[0, 0], kernel[1, 0] = torch.eye(3)[1][:, None].expand(3, 3), torch.eye(3)[1].expand(3, 3)

    seeing, nothing = (
        probe(
            make_encoder(tmp_path / name, weight=weight),
            index,
            tmp_path / f"{name}-out",
            ProbeOptions(baselines=False, levels=[0]),
        )
        for name, weight in (("seeing", upright), ("blind", blind))
    )
    assert seeing["rows"][0]["auroc"] > 0.95
    assert nothing["rows"][0]["auroc"] == 0.5


def test_features_begin_with_what_embed_gives(run: Path, index: Index, tmp_path: Path) -> None:
    """The same preprocessing and network: neighbours by `embed` alone are those of a probe without maps."""
    network = open_encoder(run)
    splits = assign_splits(index)
    parts = {p: [r for r in index.records if splits[r.image] == p] for p in ("train", "val")}
    rows = {p: np.stack([network(index.open(r)) for r in parts[p]]) for p in parts}
    expected = knn_probe(rows["train"], np.array([int(str(r.label)) for r in parts["train"]]), rows["val"], seed=0)
    probe(run, index, tmp_path / "out", ProbeOptions(protocol="knn", levels=[], baselines=False))
    table = pq.read_table(tmp_path / "out" / "cases.parquet")
    assert table["image"].to_pylist() == [r.image for r in parts["val"]]
    np.testing.assert_allclose(table["probability_1"], expected.predictions[:, 1], atol=0.02)  # stored in 16 bit


def test_the_same_call_twice_gives_the_same_bytes(run: Path, index: Index, tmp_path: Path) -> None:
    for name in ("a", "b"):
        probe(run, index, tmp_path / name, ProbeOptions(budgets=[Budget(fraction=0.5)]))
    for file in ("probe.json", "cases.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_validation_images_and_subjects_that_pretraining_saw_are_counted_and_refused_when_strict(
    index: Index, tmp_path: Path
) -> None:
    folder = make_encoder(tmp_path / "run")
    val = [record for record in index.records if record.split == "val"]
    cases = [(compute_fingerprint(index.open(val[0])), "another"), *(("", record.subject) for record in val[1:4])]
    TrainingHistory().extended("pretrain", cases).write(folder / "encoder")
    found = probe(folder, index, tmp_path / "out", ProbeOptions(baselines=False))
    assert found["contamination"] == {
        "pretrain": {"images": 1, "subjects": 3},
        "finetune": {"images": 0, "subjects": 0},
    }
    assert found["train_val_duplicates"] == {"images": 0, "subjects": 0}
    with pytest.raises(
        UserError, match=r"seen in pretraining 1 image, 3 subjects.* --fail-on-contamination allows none"
    ):
        probe(folder, index, tmp_path / "strict", ProbeOptions(baselines=False, fail_on_contamination=True))
    assert not (tmp_path / "strict").exists()


def test_the_summary_is_mean_and_standard_deviation_over_the_subsets() -> None:
    rows = [
        {"features": "encoder", "budget": "5", **dict.fromkeys(list_metrics("classification"), value), "auroc": auroc}
        for value, auroc in ((0.5, None), (0.7, 0.9))
    ]
    (found,) = summarise_probes(rows, list_metrics("classification"))
    assert found["accuracy"]["mean"] == pytest.approx(0.6)
    assert found["accuracy"]["sd"] == pytest.approx(0.2 / np.sqrt(2))
    assert found["auroc"] == {"mean": 0.9, "sd": None, "ci_low": None, "ci_high": None}
    assert found["subsets"] == 2


def test_what_is_no_pretrained_encoder_is_refused(
    index: Index, classifier: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="expected a finished run"):
        probe(tmp_path / "nowhere", index, tmp_path / "out")
    with pytest.raises(UserError, match="got a classifier, which was trained on labels"):
        probe(make_run(tmp_path / "model", classifier), index, tmp_path / "out")
    with pytest.raises(UsageError, match=r"--levels 2: expected a level of the encoder, 0 \(finest\) to 1"):
        probe(run, index, tmp_path / "out", ProbeOptions(levels=[2]))
    with pytest.raises(UsageError, match="expected one of linear, knn"):
        probe(run, index, tmp_path / "out", ProbeOptions(protocol="tree"))
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_one_size_says_so_where_images_have_another(index: Index, tmp_path: Path) -> None:
    section = {**CONVNET, "summary": "flatten", "summary_channels": 4}
    fixed = make_encoder(tmp_path / "run", {**SPEC, "encoder": section, "input_shape": [8, 8]})
    with pytest.raises(UserError, match=r"trained on \[8, 8\]; pretrain with a preprocessing that ends in that shape"):
        probe(fixed, index, tmp_path / "out", ProbeOptions(baselines=False))
