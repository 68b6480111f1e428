from __future__ import annotations

import numpy as np
import pytest
import torch

from medim.evaluation.probing.classifiers import linear_probe
from medim.models.heads import LinearProbe
from medim.models.model import Model, build_model
from medim.training.finetune.head_init import ROWS_PER_CLASS, fit_probe, start_head_as_probe
from medim.types import Array
from tests.specs import make_spec


def clouds(classes: int, each: int, width: int = 3) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(3.0 * k, 1.0 + k, (each, width)) for k in range(classes)])
    return rows.astype(np.float32), np.repeat(np.arange(classes), each)


def logits(probe: LinearProbe, rows: Array) -> Array:
    x = (torch.from_numpy(rows) - probe.mean) / probe.std
    return (x @ probe.weight.T + probe.bias).numpy()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("each", [2, 30])
def test_it_is_the_linear_probe_as_weights(classes: int, each: int) -> None:
    rows, labels = clouds(classes, each)
    oracle = linear_probe(rows, labels, rows, seed=0).predictions
    got = torch.softmax(torch.from_numpy(logits(fit_probe(rows, labels, classes=classes, seed=0), rows)), dim=1)
    np.testing.assert_allclose(got.numpy(), oracle, atol=1e-4)


def test_a_class_without_a_row_is_never_preferred() -> None:
    rows, labels = clouds(3, 6)
    seen = labels != 1
    probe = fit_probe(rows[seen], labels[seen], classes=3, seed=0)
    assert set(logits(probe, rows).argmax(1)) <= {0, 2}


@pytest.fixture
def segmenter() -> Model:
    torch.manual_seed(0)
    return build_model(
        make_spec(
            {
                "encoder": {"name": "unet", "channels": [4, 8]},
                "decoder": {"name": "unet"},
                "head": {"name": "segmentation"},
                "in_channels": 1,
                "out_channels": 2,
                "spatial_dims": 3,
                "input_shape": [8, 8, 8],
            }
        )
    )


def test_a_segmenter_scores_bright_voxels_above_dark_ones_before_its_first_step(segmenter: Model) -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.zeros(2, 8, 8, 8, dtype=torch.int64)
    target[:, 2:6, 2:6, 2:6] = 1
    image = 4.0 * target.unsqueeze(1) + 0.1 * torch.randn(2, 1, 8, 8, 8, generator=generator)
    encoder = {name: value.clone() for name, value in segmenter.encoder.state_dict().items()}
    start_head_as_probe(segmenter, [(image, target)], classes=2, seed=0)
    background, bright = segmenter(image).detach().unbind(1)
    margin = bright - background
    assert margin[target == 1].mean() - margin[target == 0].mean() > margin[target == 0].std()
    assert all(torch.equal(value, encoder[name]) for name, value in segmenter.encoder.state_dict().items())
    assert target.numel() < ROWS_PER_CLASS


def test_one_class_alone_leaves_the_head_as_it_was(segmenter: Model) -> None:
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    image = torch.randn(1, 1, 8, 8, 8)
    start_head_as_probe(segmenter, [(image, torch.zeros(1, 8, 8, 8, dtype=torch.int64))], classes=2, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())
