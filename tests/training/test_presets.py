"""The presets of objectives: one a published configuration, a small one an objective, and the tutorials' shapes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from medim.config import list_presets, load_config
from medim.models.model import build_encoder, build_model
from medim.objectives import OBJECTIVES
from medim.training.pretrain.config import build_objectives, dry_run_pretraining, resolve_pretrain_config
from tests.specs import make_spec

PUBLISHED = {
    *("dim-local-infonce", "dim-local-jsd", "dim-global", "dim-local-global", "dim-tutorial"),
    *("amdim", "cpc", "vae", "fedorov-3d"),
}
SMALL = [name for name in list_presets("pretrain") if name.startswith("test-")]


def spec_of(config: Any, **more: Any) -> dict[str, Any]:
    spec = {"encoder": config.encoder, "spatial_dims": config.spatial_dims, "in_channels": 1}
    return {**spec, "input_shape": config.views.shape, **more}


def widths(module: nn.Module) -> list[int]:
    """Sizes of a chain of linear layers, from what goes in to what comes out."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert all(before.out_features == after.in_features for before, after in pairwise(layers))
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


@pytest.mark.parametrize("dims", [2, 3])
def test_every_objective_has_a_small_preset(dims: int) -> None:
    named = {o["name"] for n in SMALL if n.startswith(f"test-{dims}d") for o in load_config("pretrain", n).objectives}
    assert named == set(OBJECTIVES)


@pytest.mark.parametrize("name", SMALL)
def test_a_small_preset_can_be_built(name: str) -> None:
    dry_run_pretraining(resolve_pretrain_config(name))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_preset_names_its_source_and_leaves_out_what_its_paper_does(name: str) -> None:
    header = [line for line in list_presets("pretrain")[name].read_text().splitlines() if line.startswith("#")]
    assert any(word in " ".join(header) for word in ("arXiv", "DuaneNielsen"))
    config = load_config("pretrain", name)
    assert config.gradient_clip == 0, "no paper of the family clips gradients"
    assert not any(section.get("batch_norm_summary") for section in config.objectives)


def test_the_papers_weights_are_those_of_its_three_settings() -> None:
    weights = {
        name: {section["name"]: section["weight"] for section in load_config("pretrain", name).objectives}
        for name in ("dim-local-infonce", "dim-global", "dim-local-global")
    }
    assert weights["dim-local-infonce"] == {"local_dim": 1.0, "prior_matching": 0.1}
    assert weights["dim-global"] == {"global_dim": 1.0, "prior_matching": 1.0}
    assert {k: v for k, v in weights["dim-local-global"].items() if k != "prior_matching"} == {
        "global_dim": 0.5,
        "local_dim": 0.1,
    }


def test_the_tutorials_network_has_the_tutorials_shapes() -> None:
    config = load_config("pretrain", "dim-tutorial")
    encoder: Any = build_encoder(make_spec(spec_of(config)))
    features = encoder(torch.zeros(2, 1, 32, 32))
    assert [tuple(m.shape[1:]) for m in features.maps] == [(64, 29, 29), (128, 26, 26), (256, 23, 23), (512, 20, 20)]
    assert features.summary.shape == (2, 64)
    objectives = {name: objective for name, (objective, _) in build_objectives(config, encoder, None, 1).items()}
    assert widths(objectives["local_dim"].critic) == [128 + 64, 512, 512, 1]
    assert widths(objectives["global_dim"].critic) == [32 * 22 * 22 + 64, 512, 512, 1]
    assert widths(objectives["prior_matching"]) == [64, 1000, 200, 1]
    assert {name: load_section["weight"] for name, load_section in zip(objectives, config.objectives, strict=True)} == {
        "global_dim": 0.5,
        "local_dim": 1.0,
        "prior_matching": 0.1,
    }


def test_the_tutorials_classifier_goes_from_64_by_15_and_10_to_the_classes() -> None:
    config = load_config("finetune", "dim-tutorial-classification")
    model = build_model(make_spec(spec_of(config, decoder=None, head=config.head, out_channels=10)))
    assert widths(model.head) == [64, 15, 10, 10]
