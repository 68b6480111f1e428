"""Networks of a configuration before its first step: parameters that a backward pass does not reach."""

from __future__ import annotations

from typing import Any

import pytest

from medim.config import PretrainConfig, check_config
from medim.training.pretrain.config import has_unused_parameters

CRITIC = {"name": "encode_and_dot", "width": 4}
LOCAL = {"name": "local_dim", "estimator": "infonce", "critic": CRITIC}


def configure(*objectives: dict[str, Any], **changes: Any) -> PretrainConfig:
    content = {
        "modality": "xray",
        "preprocessing": [{"op": "normalise", "method": "zscore"}],
        "encoder": {"name": "unet", "channels": [4, 8], "summary_channels": 4, "norm": "in"},
        "decoder": {"name": "unet", "norm": "in"},
        "views": {"shape": [8, 8]},
        "objectives": list(objectives),
        "max_steps": 2,
        "batch_size": 4,
        "lr": 0.01,
        **changes,
    }
    config = check_config("pretrain", content, source="test")
    assert isinstance(config, PretrainConfig)
    return config


RECONSTRUCTION = {"name": "reconstruction", "mask_patch_size": 2}


@pytest.mark.parametrize(
    ("config", "is_unused"),
    [
        (configure(LOCAL, RECONSTRUCTION), False),
        (configure(LOCAL), True),  # the decoder
        (configure(LOCAL, decoder=None), False),
        (configure({**LOCAL, "weight": 0.0}, RECONSTRUCTION), True),  # the critic
        (configure({**LOCAL, "feature_level": 0}, decoder=None), False),  # the summary uses the coarsest map
        (configure({"name": "cpc", "skip": 0, "steps": 1}, decoder=None), True),  # the summary
        (configure(LOCAL, {"name": "prior_matching", "hidden": [4]}, decoder=None), True),  # two backward passes
        (configure(LOCAL, decoder=None, gradient_cache_chunk=2), True),
    ],
)
def test_parameters_without_gradient_are_detected_before_the_first_step(
    config: PretrainConfig, is_unused: bool
) -> None:
    assert has_unused_parameters(config) == is_unused
