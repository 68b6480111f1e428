from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

import medim
from medim.config import PretrainConfig, ViewsConfig
from medim.data.contamination import load_training_history
from medim.data.fingerprints import compute_fingerprint
from medim.data.index.index import Index
from medim.data.loading.cohort import open_cohort
from medim.data.loading.splits import assign_splits
from medim.files import file_sha256, read_json, write_json
from medim.model_spec import Provenance
from medim.models.serialization import save_model
from medim.objectives.coordinates import compute_offset_entropy
from medim.objectives.score_map import load_score_map
from medim.signals import StoppedError
from medim.training.engine.checkpoints import find_newest_checkpoint
from medim.training.engine.progress import LineProgress
from medim.training.pretrain.checkpoint_selection import CheckpointSelection
from medim.training.pretrain.config import build_objectives, dry_run_pretraining
from medim.training.pretrain.options import PretrainOptions
from medim.training.pretrain.run import pretrain
from medim.types import UsageError, UserError

WEIGHTS = Path("encoder") / "encoder.safetensors"


@pytest.fixture(scope="module")
def trained(pretrain_config: PretrainConfig, cohort_index: Index, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its store."""
    folder = tmp_path_factory.mktemp("trained")
    pretrain(pretrain_config, cohort_index, folder / "undisturbed", store=folder / "store")
    return folder


@pytest.fixture
def undisturbed(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path / "undisturbed"


def test_a_run_leaves_what_the_contract_lists(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    names = {"local_dim", "coordinates", "prior_matching"}
    assert set(summary["objectives"]) == names == set(summary["loss"]) == set(summary["chance"])
    assert summary["steps"] == 6
    assert summary["chance"]["local_dim"] == pytest.approx(math.log(1 + 3 * 8**3))
    assert summary["chance"]["coordinates"] == pytest.approx(3 * math.log(8))
    assert summary["chance"]["prior_matching"] is None
    assert summary["verdict"] in {"learning", "at-chance", "collapsed", "diverged"}
    assert all(summary["loss"][name]["val"] is not None for name in names)
    assert summary["peak_memory_bytes"] > 0 < summary["seconds_per_step"]
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["max_steps"] == 6
    steps = {int(row["step"]) for row in csv.DictReader((undisturbed / "history.csv").open()) if row["loss"]}
    assert steps == set(range(1, 7))


def test_a_run_says_how_its_features_fare_and_which_step_it_leaves(undisturbed: Path) -> None:
    summary = json.loads((undisturbed / "summary.json").read_text())
    rows = list(csv.DictReader((undisturbed / "history.csv").open()))
    measured = {row["name"]: int(row["step"]) for row in rows if row["val"]}
    assert {"rankme", "feature_std", "alignment", "uniformity"} <= set(measured)
    assert {row["name"] for row in rows if row["name"].startswith("gradient_norm/") and float(row["loss"]) > 0} == {
        f"gradient_norm/{part}" for part in ("encoder", "local_dim", "coordinates")
    }
    assert 0 <= summary["alignment"] <= 4
    assert summary["uniformity"] <= 0
    assert summary["probe"] is None, "these images have no labels"
    chosen = summary["checkpoint_selection"]
    assert chosen["criterion"] in {"val_loss", "last_step"}
    assert json.loads((undisturbed / "encoder" / "encoder.json").read_text())["checkpoint_selection"] == chosen
    assert f"those of step {chosen['step']} of 6" in (undisturbed / "encoder" / "card.md").read_text()
    assert summary["verdict_changes"][-1]["verdict"] == summary["verdict"]


def test_a_run_leaves_the_weights_of_the_step_it_has_chosen(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(self: CheckpointSelection, step: int, *args: Any) -> None:
        consider(self, step, 1.0 if step == 2 else 0.0, 0.5, *args[2:])

    consider = CheckpointSelection.update
    short = pretrain_config.model_copy(update={"max_steps": 2, "schedule": "constant"})
    long = pretrain_config.model_copy(update={"schedule": "constant"})
    pretrain(short, cohort_index, tmp_path / "short", store=tmp_path / "store")
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSelection, "update", second)
        summary = pretrain(long, cohort_index, tmp_path / "long", store=tmp_path / "store")
    assert (
        summary["checkpoint_selection"]["step"],
        summary["checkpoint_selection"]["last_step"],
        summary["steps"],
    ) == (2, 6, 6)
    assert file_sha256(tmp_path / "long" / WEIGHTS) == file_sha256(tmp_path / "short" / WEIGHTS)


class _Diverging(pl.Callback):
    """Overwrites a weight of the encoder with NaN after the first step."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        with torch.no_grad():
            next(module.encoder.parameters()).view(-1)[0] = float("nan")


def test_a_diverged_run_leaves_its_history_but_no_encoder(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    config = pretrain_config.model_copy(update={"max_steps": 2})
    with pytest.raises(UserError, match=r"weights are NaN or infinite, so the training has diverged\. Train again"):
        pretrain(config, cohort_index, tmp_path / "run", store=tmp_path / "store", callbacks=(_Diverging(),))
    assert (tmp_path / "run" / "history.csv").is_file()
    assert not (tmp_path / "run" / "encoder").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_leaves_its_split_and_what_it_has_seen(undisturbed: Path, cohort_index: Index) -> None:
    splits = assign_splits(cohort_index)
    rows = list(csv.DictReader((undisturbed / "split.csv").open()))
    assert {row["image"]: row["split"] for row in rows} == splits
    assert sorted({row["label_rank"] for row in rows}) == ["", "1", "2", "3", "4", "5", "6"]
    assert {row["used_for_training"] for row in rows} == {""}
    seen = load_training_history(undisturbed)
    assert seen
    cases = {r.image: (compute_fingerprint(cohort_index.open(r)), r.subject) for r in cohort_index.records}
    assert {image for image, case in cases.items() if seen.contains("pretrain", case)} == {
        image for image, part in splits.items() if part == "train"
    }
    assert json.loads((undisturbed / "summary.json").read_text())["train_val_duplicates"] == {
        "images": 0,
        "subjects": 0,
    }


def test_the_loaded_encoder_gives_the_maps_and_summary_it_promises(undisturbed: Path) -> None:
    encoder = medim.load_encoder(undisturbed)
    features = encoder(torch.zeros(2, 1, 16, 16, 16))
    assert [tuple(m.shape) for m in features.maps] == [
        (2, c, *(16 // s,) * 3) for c, s in zip(encoder.channels, encoder.strides, strict=True)
    ]
    assert features.summary.shape == (2, encoder.summary_channels)
    assert encoder.spec.layout.receptive_field_voxels == [5, 11, 23]
    assert encoder.spec.layout.receptive_field_mm is None  # no step resamples


def test_the_critic_of_a_run_is_kept_with_what_it_is_rebuilt_from(
    undisturbed: Path, pretrain_config: PretrainConfig
) -> None:
    kept = json.loads((undisturbed / "encoder" / "critic.json").read_text())
    assert kept["objective"] == pretrain_config.objectives[0]
    network = load_score_map(undisturbed)
    assert network is not None
    assert network.objective._standardise.num_batches_tracked == 6
    scores = network(torch.randn(1, 1, 16, 16, 16))
    assert scores.shape == (1, 1, 16, 16, 16)
    assert scores.std() > 0


def test_the_same_command_twice_gives_the_same_bytes_and_another_seed_gives_others(
    undisturbed: Path, pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    pretrain(pretrain_config, cohort_index, tmp_path / "again", store=tmp_path / "store")
    pretrain(pretrain_config, cohort_index, tmp_path / "other", store=tmp_path / "store", seed=1)
    assert file_sha256(undisturbed / WEIGHTS) == file_sha256(tmp_path / "again" / WEIGHTS)
    assert file_sha256(undisturbed / WEIGHTS) != file_sha256(tmp_path / "other" / WEIGHTS)


@pytest.mark.slow
def test_loading_processes_do_not_change_a_byte(
    undisturbed: Path, pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    config = pretrain_config.model_copy(update={"workers": 1})
    pretrain(config, cohort_index, tmp_path / "workers", store=tmp_path / "store")
    assert file_sha256(undisturbed / WEIGHTS) == file_sha256(tmp_path / "workers" / WEIGHTS)


def test_a_run_stopped_by_an_exception_and_resumed_ends_in_the_same_bytes(
    undisturbed: Path,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def power_cut(
        self: LineProgress, trainer: object, module: object, outputs: object, batch: object, index: int
    ) -> None:
        if trainer.global_step == 5:  # type: ignore[attr-defined]
            raise RuntimeError("power cut")

    out = tmp_path / "resumed"
    with monkeypatch.context() as patch:
        patch.setattr(LineProgress, "on_train_batch_end", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(pretrain_config, cohort_index, out, store=tmp_path / "store")
    assert not (out / "summary.json").exists()
    summary = pretrain(pretrain_config, cohort_index, out, store=tmp_path / "store", resume=True)
    assert summary["resumed_from_steps"] == [4]
    assert file_sha256(undisturbed / WEIGHTS) == file_sha256(out / WEIGHTS)
    assert (out / "history.csv").read_bytes() == (undisturbed / "history.csv").read_bytes()
    ignored = {"resumed_from_steps", "seconds", "seconds_per_step", "dataloader_wait_fraction", "peak_memory_bytes"}
    told = json.loads((undisturbed / "summary.json").read_text())
    assert {k: v for k, v in summary.items() if k not in ignored} == {k: v for k, v in told.items() if k not in ignored}


@pytest.mark.parametrize(("number", "at"), [(signal.SIGTERM, 3), (signal.SIGUSR1, 4)])
def test_a_signal_saves_the_step_it_comes_in_and_leaves_with_75(
    number: int,
    at: int,
    undisturbed: Path,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def requeue(self: LineProgress, trainer: Any, *_: object) -> None:
        if trainer.global_step == at:  # a validation follows the fourth step, and is done first
            os.kill(os.getpid(), number)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(LineProgress, "on_train_batch_end", requeue)
        with pytest.raises(StoppedError, match=f"step {at} is saved") as stopped:
            pretrain(pretrain_config, cohort_index, out, store=tmp_path / "store")
    assert stopped.value.exit_code == 75
    assert not (out / "summary.json").exists()
    summary = pretrain(pretrain_config, cohort_index, out, store=tmp_path / "store", resume=True)
    assert summary["resumed_from_steps"] == [at]
    assert file_sha256(undisturbed / WEIGHTS) == file_sha256(out / WEIGHTS)
    assert (out / "history.csv").read_bytes() == (undisturbed / "history.csv").read_bytes()


def test_a_signal_while_the_encoder_is_written_is_answered_and_costs_no_step(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretrain_config.model_copy(update={"max_steps": 5})  # which is no multiple of the interval
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    pretrain(config, cohort_index, whole, store=tmp_path / "store")

    def requeue(*given: Any, **options: Any) -> None:
        save_model(*given, **options)
        if given[0].name == "encoder":  # not in the rehearsal
            os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr("medim.training.pretrain.save_encoder.save_model", requeue)
        with pytest.raises(StoppedError, match="--resume continues"):
            pretrain(config, cohort_index, out, store=tmp_path / "store")
    assert not (out / "summary.json").exists()
    assert find_newest_checkpoint(out / "checkpoints")[1] == 5
    summary = pretrain(config, cohort_index, out, store=tmp_path / "store", resume=True)
    assert (summary["steps"], summary["resumed_from_steps"]) == (5, [5])
    assert file_sha256(whole / WEIGHTS) == file_sha256(out / WEIGHTS)
    assert (out / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    undisturbed: Path,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = file_sha256(undisturbed / WEIGHTS)
    newest, step = find_newest_checkpoint(undisturbed / "checkpoints")
    assert newest is not None
    assert step == 6
    newest.write_bytes(newest.read_bytes()[:3000])
    assert find_newest_checkpoint(undisturbed / "checkpoints")[1] == 4
    assert "step-6.ckpt is corrupt and was renamed" in caplog.text
    summary = pretrain(pretrain_config, cohort_index, undisturbed, store=tmp_path / "store", resume=True)
    assert summary["resumed_from_steps"] == [4]
    assert summary["corrupt_checkpoints"] == ["step-6.ckpt"]
    assert file_sha256(undisturbed / WEIGHTS) == expected
    assert find_newest_checkpoint(undisturbed / "checkpoints") == (newest, 6)


def test_a_finished_run_is_resumed_at_once_and_a_damaged_one_is_repaired(
    undisturbed: Path,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "medim")
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("medim.training.pretrain.run.run_trainer", break_now)
        summary = pretrain(pretrain_config, cohort_index, undisturbed, store=tmp_path / "store", resume=True)
    assert summary == read_json(undisturbed / "summary.json")
    assert "already finished, with 6 steps; nothing is left to do" in caplog.text
    assert {path: path.read_bytes() for path in before if path.name != ".medim"} == {
        path: content for path, content in before.items() if path.name != ".medim"
    }
    weights = (undisturbed / WEIGHTS).read_bytes()
    (undisturbed / WEIGHTS).write_bytes(weights[:-8])
    pretrain(pretrain_config, cohort_index, undisturbed, store=tmp_path / "store", resume=True)
    assert (undisturbed / WEIGHTS).read_bytes() == weights


def test_resume_without_a_checkpoint_starts_at_step_0(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    summary = pretrain(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store", resume=True)
    assert summary["steps"] == 6
    assert summary["resumed_from_steps"] == []


@pytest.mark.slow
def test_resume_may_load_with_other_processes(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    first = pretrain(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    (tmp_path / "run" / "checkpoints" / "step-6.ckpt").unlink()
    other = pretrain_config.model_copy(update={"workers": 1, "prefetch": 3})
    again = pretrain(other, cohort_index, tmp_path / "run", store=tmp_path / "store", resume=True)
    assert again["loss"] == first["loss"]


def test_resume_with_another_configuration_is_refused(
    undisturbed: Path, pretrain_config: PretrainConfig, cohort_index: Index
) -> None:
    other = pretrain_config.model_copy(update={"lr": 0.5})
    with pytest.raises(UserError, match="needs the same configuration"):
        pretrain(other, cohort_index, undisturbed, resume=True)
    selected = cohort_index.select("shape_x>0 and subject!=Zzyzx")
    with pytest.raises(UserError, match=r"the run had where None \(now shape_x>0 and subject!=s-"):
        pretrain(pretrain_config, selected, undisturbed, resume=True)
    inputs = read_json(undisturbed / "inputs.json")
    del inputs["where"]  # as of an earlier version
    write_json(undisturbed / "inputs.json", inputs)
    assert pretrain(pretrain_config, selected, undisturbed, resume=True)["where"] == selected.where
    steps, store = pretrain_config.preprocessing, undisturbed.parent / "store"
    cohort = open_cohort(selected, selected.records, steps, split_seed=0, store=store)
    spec = cohort.build_spec(pretrain_config, seed=0, split_seed=0)
    assert spec.provenance.where == "shape_x>0 and subject!=hidden"
    assert Provenance.from_json(spec.provenance.to_json()) == spec.provenance


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(
    undisturbed: Path, pretrain_config: PretrainConfig, cohort_index: Index
) -> None:
    with pytest.raises(UserError, match="--resume"):
        pretrain(pretrain_config, cohort_index, undisturbed)
    assert (undisturbed / "summary.json").is_file()


def test_a_single_training_subject_is_refused_before_images_are_preprocessed(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.training.pretrain.run.open_cohort", lambda *_, **__: pytest.fail("preprocessed"))
    few = Index(
        root=cohort_index.root,
        modality="mri",
        records=cohort_index.records[:4],
        rejected=(),
        classes=cohort_index.classes,
    )
    with pytest.raises(UserError, match="at least 2 subjects to train on, got 1"):
        pretrain(pretrain_config, few, tmp_path / "run", store=tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"encoder": {"name": "unett"}}, "Did you mean 'unet'"),
        ({"encoder": {"name": "unet", "channels": []}}, "unet.channels: expected one or more"),
        ({"encoder": {"name": "convnet", "channels": [4, -8]}}, "convnet.channels.1: expected a number of at least 1"),
        ({"objectives": [{"name": "localdim"}]}, "Did you mean 'local_dim'"),
        ({"objectives": [{"name": "amdim"}]}, "Set views.count: 2"),
        ({"objectives": [{"name": "simclr"}]}, "Set views.count: 2"),
        ({"objectives": [{"name": "dense_dim"}]}, "add a decoder to the config"),
        ({"batch_size": 1}, "batch_size: expected 2 or more"),
        ({"views": ViewsConfig(shape=(2, 2, 2))}, "views.shape .* not possible with the encoder"),
        ({"views": ViewsConfig(shape=(16, 16, 16), augmentations=[{"op": "nois"}])}, "Did you mean 'noise'"),
    ],
)
def test_a_section_that_cannot_be_built_is_refused_before_anything_is_written(
    changes: dict[str, Any], said: str, pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        pretrain(pretrain_config.model_copy(update=changes), cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "decoder", "chance"),
    [
        ({"name": "dense_dim", "width": 8, "points": 20}, {"name": "unet"}, math.log(20)),
        ({"name": "amdim", "width": 8}, None, 2 * math.log(1 + 3 * 4**3) + math.log(1 + 3 * 8**3)),
        ({"name": "simclr", "width": 8}, None, math.log(2 * 4 - 1)),
        (
            {"name": "coordinates", "kind": "relative", "feature_level": -1, "hidden": 8},
            None,
            3 * compute_offset_entropy(4),
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_objectives_of_two_views_run_to_a_summary(
    section: dict[str, Any],
    decoder: dict[str, Any] | None,
    chance: float,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
) -> None:
    views = pretrain_config.views.model_copy(update={"count": 2})
    config = pretrain_config.model_copy(update={"objectives": [section], "decoder": decoder, "views": views})
    summary = pretrain(config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert summary["chance"] == {section["name"]: pytest.approx(chance, abs=1e-3)}
    assert math.isfinite(summary["loss"][section["name"]]["val"])
    assert (tmp_path / "run" / "encoder" / "decoder.safetensors").is_file() == (decoder is not None)


TWO_FLIPPED = ViewsConfig(shape=(16, 16, 16), count=2, augmentations=[{"op": "flip"}])
TWO_APART = ViewsConfig(shape=(16, 16, 16), count=2, same_crop=False)


@pytest.mark.parametrize("views", [TWO_FLIPPED, TWO_APART])
def test_views_whose_voxels_do_not_correspond_are_refused_by_what_needs_it(
    views: ViewsConfig, pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    dense = {"objectives": [{"name": "dense_dim"}], "decoder": {"name": "unet"}, "views": views}
    with pytest.raises(UsageError, match="dense_dim: expected views with corresponding voxels"):
        pretrain(pretrain_config.model_copy(update=dense), cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert not list(tmp_path.iterdir())
    alone = dense | {"views": views.model_copy(update={"count": 1})}
    dry_run_pretraining(pretrain_config.model_copy(update=alone))


@pytest.mark.parametrize(("devices", "options"), [(1, "tpu"), (2, "tpu --devices 2 --nodes 1")])
def test_an_unavailable_device_is_rejected_before_images_are_read_or_files_are_written(
    devices: int,
    options: str,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("medim.data.loading.cohort.fill_store", lambda *_, **__: pytest.fail("an image was read"))
    with pytest.raises(UserError, match=f"--device {options}: not available on this machine"):
        pretrain(pretrain_config, cohort_index, tmp_path / "run", accelerator="tpu", devices=devices)
    assert not list(tmp_path.iterdir())


def test_four_subjects_train_with_a_smaller_batch_and_claim_nothing(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = Index(
        root=cohort_index.root,
        modality="mri",
        records=cohort_index.records[:8],
        rejected=(),
        classes=cohort_index.classes,
    )
    summary = pretrain(pretrain_config, few, tmp_path / "run", store=tmp_path / "store")
    assert (summary["verdict"], summary["advice"]) == ("not-measured", "Add subjects: validation needs at least 2.")
    assert summary["loss"]["local_dim"]["val"] is None
    assert summary["rankme"] is None
    assert "batch_size 4 exceeds the 3 training subjects" in caplog.text
    assert "validation subjects: 1" in caplog.text


def test_a_misspelt_objective_option_names_the_right_one(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    config = pretrain_config.model_copy(update={"objectives": [{"name": "local_dim", "batchnorm_summary": True}]})
    with pytest.raises(UsageError, match="Did you mean 'batch_norm_summary'"):
        pretrain(config, cohort_index, tmp_path / "run", store=tmp_path / "store")


def test_the_same_objective_twice_keeps_two_names(pretrain_config: PretrainConfig, undisturbed: Path) -> None:
    twice = [{"name": "local_dim", "feature_level": level, "weight": 0.5} for level in (0, 1)]
    config = pretrain_config.model_copy(update={"objectives": twice})
    objectives = build_objectives(config, medim.load_encoder(undisturbed), None, 1)
    assert list(objectives) == ["local_dim", "local_dim_2"]
    assert [weight for _, weight in objectives.values()] == [0.5, 0.5]


@pytest.mark.parametrize(
    "section",
    [
        {"name": "cpc", "feature_level": 0, "steps": 2, "layers": 1, "negatives": 4},
        {"name": "vae", "decoder_channels": [8, 4]},
        {"name": "beta_vae", "decoder_channels": [8, 4]},
    ],
    ids=lambda section: section["name"],
)
def test_an_objective_alone_trains_an_encoder_from_image_files(
    section: dict[str, Any], pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    config = pretrain_config.model_copy(update={"objectives": [section], "max_steps": 2})
    summary = pretrain(config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    name = section["name"]
    assert set(summary["loss"]) == set(summary["chance"]) == {name}
    assert summary["chance"][name] > 0
    assert all(value is not None for value in summary["loss"][name].values())
    assert medim.load_encoder(tmp_path / "run")(torch.zeros(1, 1, 16, 16, 16)).summary.shape == (1, 8)


def test_options_are_given_as_an_object_or_by_name_and_a_misspelt_one_is_refused(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path
) -> None:
    config = pretrain_config.model_copy(update={"max_steps": 2})
    options = PretrainOptions(seed=3, store=tmp_path / "store")
    one = pretrain(config, cohort_index, tmp_path / "one", options)
    two = pretrain(config, cohort_index, tmp_path / "two", PretrainOptions(store=tmp_path / "store"), seed=3)
    assert one["loss"] == two["loss"]
    assert file_sha256(tmp_path / "one" / WEIGHTS) == file_sha256(tmp_path / "two" / WEIGHTS)
    with pytest.raises(TypeError, match="sede"):
        pretrain(config, cohort_index, tmp_path / "three", sede=3)


def break_now(*_: Any, **__: Any) -> Any:
    raise IndexError("planted")


def test_weights_that_cannot_be_written_end_the_run_before_its_first_step(
    pretrain_config: PretrainConfig, cohort_index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("Some tensors share memory")

    monkeypatch.setattr("medim.models.serialization.safetensors.torch.save", refuse)
    monkeypatch.setattr("medim.training.pretrain.run.run_trainer", lambda *_, **__: pytest.fail("a step was made"))
    with pytest.raises(UserError, match=r"weights of the encoder cannot be written \(Some tensors share memory\)"):
        pretrain(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert not (tmp_path / "run" / ".medim-rehearsal").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pretrain.run.draw_training_figures", "figures: not written (IndexError: planted)"),
        ("pretrain.run.log_results", "records of the results for MLflow: not written (IndexError: planted)"),
        ("fit_ood.fit_detector", "no out-of-distribution detector was written: planted"),
        ("fit_ood._fit_from_cohort", "no out-of-distribution detector was written: planted"),
    ],
)
def test_what_fails_after_the_last_step_never_loses_the_encoder(
    place: str,
    message: str,
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(f"medim.training.{place}", break_now)
    monkeypatch.setattr("medim.training.fit_ood.MIN_TRAINING_SUBJECTS", 2)
    monkeypatch.setattr("medim.training.fit_ood.MIN_HELD_OUT_SUBJECTS", 1)
    summary = pretrain(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert message in caplog.text
    assert read_json(tmp_path / "run" / "summary.json")["steps"] == summary["steps"]
    medim.load_encoder(tmp_path / "run")


def test_an_objective_whose_loss_cannot_be_computed_shows_before_images_are_read(
    pretrain_config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.objectives.infomax.LocalDIM.forward", break_now)
    with pytest.raises(UsageError, match=r"objective local_dim: its loss cannot be computed for .*planted"):
        dry_run_pretraining(pretrain_config)


def test_a_network_that_accepts_no_whole_image_is_reported_before_the_first_step(
    pretrain_config: PretrainConfig,
    cohort_index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("medim.training.fit_ood.iterate_record_features", break_now)
    monkeypatch.setattr("medim.training.pretrain.run.run_trainer", break_now)
    with pytest.raises(IndexError):
        pretrain(pretrain_config, cohort_index, tmp_path / "run", store=tmp_path / "store")
    assert "there will be no out-of-distribution detector for this network: planted" in caplog.text
    assert (tmp_path / "run" / "figures" / "views.png").is_file()
