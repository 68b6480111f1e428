"""The mutual-information map: whose summary meets whose locals, where a score lies, and what a trained critic sees."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medim.config import build_from_section
from medim.files import read_json, write_json
from medim.models.model import build_encoder
from medim.models.serialization import save_model
from medim.objectives import OBJECTIVES
from medim.objectives.objective import encoder_info
from medim.objectives.score_map import MutualInformationMap, interpolation_weights, load_score_map
from medim.types import Features, UserError, Views
from tests.specs import make_spec

CRITIC = {"name": "encode_and_dot", "width": 16, "scale_scores": True, "local_norm": "none", "summary_norm": "none"}
SECTION = {"name": "local_dim", "estimator": "infonce", "batch_norm_summary": True, "critic": CRITIC}


def made(dims: int, shape: tuple[int, ...], section: dict[str, Any] = SECTION, **encoder: Any) -> MutualInformationMap:
    torch.manual_seed(0)
    section_of_encoder = {"name": "unet", "channels": [4, 8], "summary_channels": 6, **encoder}
    spec = {"encoder": section_of_encoder, "in_channels": 1, "spatial_dims": dims, "input_shape": list(shape)}
    network: Any = build_encoder(make_spec(spec))
    objective = build_from_section(
        OBJECTIVES, section, **encoder_info(network, None, in_channels=1, spatial_dims=dims, input_shape=shape)
    )
    found = MutualInformationMap(network, objective, {}).eval()
    found.encoder.spec = make_spec(spec)
    return found


@pytest.mark.parametrize(("shape", "level"), [((12, 16), 1), ((9, 14), -1), ((8, 6, 10), 1), ((5, 7, 6), 0)])
def test_a_cell_has_the_score_that_the_critic_gives_it_alone(shape: tuple[int, ...], level: int) -> None:
    network = made(len(shape), shape, {**SECTION, "feature_level": level})
    images = torch.randn(3, 1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.objective.train()(SimpleNamespace(clean=network.encoder(images), generator=None), views_of(images))
        network.eval()  # with running statistics that standardising changes something by
        scores = network.objective.score_map(network.encoder(images))
        assert scores.shape[:2] == (3, 1)
        for image, found in zip(images, scores, strict=True):
            features = network.encoder(image[None])
            summary = (features.summary - network.objective._standardise.running_mean) / (
                network.objective._standardise.running_var + 1e-5
            ).sqrt()
            local = features.maps[level].flatten(2)
            for place, cell in zip(found.flatten(), local.unbind(2), strict=True):
                alone, _ = network.objective.critic(cell.unsqueeze(2), summary.unsqueeze(2))
                assert place.item() == pytest.approx(alone.item(), abs=1e-5)


def views_of(images: torch.Tensor) -> Views:
    return Views(images[:, None], torch.zeros(len(images), 1, images.ndim - 2))


@pytest.mark.parametrize(
    ("size", "cells", "stride", "first"),
    [(32, 16, 2, 0.5), (32, 16, 2, 0.0), (33, 17, 2, 0.0), (32, 26, 1, 3.0), (30, 3, 8, 3.5), (9, 11, 1, -1.0)],
)
def test_scores_lie_at_the_centres_of_their_cells_and_linear_between_them(
    size: int, cells: int, stride: int, first: float
) -> None:
    centres = first + stride * torch.arange(cells)
    weights = interpolation_weights(size, cells, first, stride)
    voxels = centres @ weights  # each voxel's place, where there are cells on both sides
    torch.testing.assert_close(voxels, torch.arange(size).clamp(centres[0], centres[-1]), atol=1e-4, rtol=0)
    constant = torch.ones(cells) @ weights
    torch.testing.assert_close(constant, torch.ones(size))


@pytest.mark.parametrize("shape", [(12, 18), (8, 6, 10)])
def test_the_map_has_the_grid_of_the_image_and_runs_along_its_axes(shape: tuple[int, ...]) -> None:
    network = made(len(shape), shape)
    image = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores, coarse = network(image), network.objective.score_map(network.encoder(image))
    assert scores.shape == image.shape
    every_other = (..., *[slice(None, None, 2)] * len(shape))
    torch.testing.assert_close(scores[every_other], coarse)  # 3-wide kernels at stride 2: cell c lies on voxel 2 c
    between = (coarse[..., :-1] + coarse[..., 1:]) / 2
    torch.testing.assert_close(scores[(*every_other[:-1], slice(1, -1, 2))], between)


@pytest.mark.parametrize("shape", [(12, 18), (8, 6, 10)])
def test_cells_that_lie_between_voxels_are_drawn_there(shape: tuple[int, ...]) -> None:
    encoder = {"name": "convnet", "hidden": 0, "summary": "mean_max"}
    network = made(
        len(shape), shape, {**SECTION, "feature_level": 0}, **encoder
    )  # 4-wide kernels: cell c lies at 2 c + 0.5
    image = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores, coarse = network(image), network.objective.score_map(network.encoder(image))
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    want = torch.nn.functional.interpolate(coarse, shape, mode=mode)  # which centres cells, right for such kernels
    torch.testing.assert_close(scores, want)


def stripes(angles: np.ndarray[Any, Any], phase: np.ndarray[Any, Any]) -> torch.Tensor:
    """Images (N, 1, 24, 24) of one orientation each."""
    down, along = np.meshgrid(np.arange(24), np.arange(24), indexing="ij")
    turn = np.pi * angles[:, None, None] / 4
    waves = np.sin(1.5 * (np.cos(turn) * down + np.sin(turn) * along) + phase[:, None, None])
    return torch.from_numpy(waves[:, None].astype(np.float32))


@pytest.fixture(scope="module")
def trained() -> MutualInformationMap:
    """An encoder and its critic after some steps on striped images; what an image has in common is its orientation."""
    network = made(2, (24, 24), norm="bn", channels=[8, 8]).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    rng = np.random.default_rng(0)
    for _ in range(80):
        images = stripes(rng.permutation(np.repeat(np.arange(4), 3)), rng.uniform(0, 6, 12))
        images = images + 0.2 * torch.from_numpy(rng.standard_normal(images.shape).astype(np.float32))
        encode = SimpleNamespace(clean=network.encoder(images), generator=None)
        optimiser.zero_grad()
        network.objective(encode, views_of(images))["local_dim"].loss.backward()
        optimiser.step()
    return network.eval()


def test_a_patch_that_does_not_belong_to_the_image_has_lower_scores(trained: MutualInformationMap) -> None:
    angles = np.arange(4)
    images, others = (stripes((angles + turn) % 4, np.ones(4)) for turn in (0, 2))
    patched = images.clone()
    patched[..., 4:14, 10:20] = others[..., 4:14, 10:20]
    with torch.no_grad():
        whole, scores = trained(images), trained(patched)
    patch = (..., slice(6, 12), slice(12, 18))  # without its border
    assert scores[patch].mean() < scores[..., 16:, :].mean() - 1
    assert scores[patch].mean() < whole[patch].mean() - 1  # it is not the place that made them low


def test_the_summary_of_another_image_lowers_the_scores(trained: MutualInformationMap) -> None:
    images = stripes(np.arange(4), np.ones(4))
    with torch.no_grad():
        features = trained.encoder(images)
        own = trained.objective.score_map(features)
        swapped = trained.objective.score_map(Features(features.maps, features.summary.roll(1, 0)))
    assert swapped.mean() < own.mean() - 1


def test_a_critic_of_an_earlier_version_draws_the_same_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, folder = made(2, (12, 16)), tmp_path / "encoder"
    save_model(folder, "encoder", network.encoder, make_spec(network.encoder.spec))
    critic = {"name": "encode_and_dot", "width": 16, "scaled": True, "local_norm": "none", "summary_norm": "none"}
    section = {"name": "local_dim", "estimator": "infonce", "level": 1, "standardise": True, "critic": critic}
    save_model(folder, "critic", network.objective, {"kind": "critic", "objective": section})
    again, image = load_score_map(tmp_path), torch.randn(1, 1, 12, 16)
    assert again is not None
    torch.testing.assert_close(again(image), network(image), rtol=0, atol=0)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "change", [{"name": True}, {"critic": []}, {"critic": {"name": "encode_and_dot", "width": []}}]
)
def test_a_damaged_critic_section_is_refused_by_its_file(change: dict[str, object], tmp_path: Path) -> None:
    network, folder = made(2, (12, 16)), tmp_path / "encoder"
    save_model(folder, "encoder", network.encoder, make_spec(network.encoder.spec))
    save_model(folder, "critic", network.objective, {"kind": "critic", "objective": {**SECTION, **change}})
    with pytest.raises(UserError, match=r"encoder/critic\.json: "):
        load_score_map(tmp_path)


def test_a_saved_critic_draws_the_same_map_and_a_run_without_one_draws_none(tmp_path: Path) -> None:
    network = made(2, (12, 16))
    folder = tmp_path / "encoder"
    save_model(folder, "encoder", network.encoder, make_spec(network.encoder.spec))
    assert load_score_map(tmp_path) is None
    save_model(folder, "critic", network.objective, {"kind": "critic", "objective": SECTION})
    again = load_score_map(tmp_path)
    assert again is not None
    assert not again.training
    image = torch.randn(1, 1, 12, 16)
    torch.testing.assert_close(again(image), network(image), rtol=0, atol=0)
    spec = read_json(folder / "critic.json")
    write_json(folder / "critic.json", {**spec, "objective": "local_dim"})  # as early versions wrote it
    assert load_score_map(tmp_path) is None
    write_json(folder / "critic.json", {key: value for key, value in spec.items() if key != "objective"})
    with pytest.raises(UserError, match=r"critic\.json: expected a mapping as 'objective', got no such key"):
        load_score_map(tmp_path)
    write_json(folder / "critic.json", {**spec, "sha256": "0" * 64})
    with pytest.raises(UserError, match="sha256"):
        load_score_map(tmp_path)
