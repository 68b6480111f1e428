from __future__ import annotations

import pytest
import torch

from medim.config import Precision
from medim.training.engine.trainer import choose_precision


@pytest.mark.parametrize(("arithmetic", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_is_used_on_a_cpu_only_where_it_has_the_arithmetic(
    arithmetic: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arithmetic)
    assert choose_precision("bf16-mixed", "cpu", 2) == used
    assert choose_precision("32-true", "cpu", 2) == "32-true"
    assert choose_precision("bf16-mixed", "cuda", 2) == "bf16-mixed"


@pytest.mark.parametrize(("arithmetic", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_fp16_is_for_gpus_and_a_cpu_takes_what_it_has(
    arithmetic: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arithmetic)
    assert choose_precision("16-mixed", "cpu", 2) == used
    assert choose_precision("16-mixed", "cuda", 2) == "16-mixed"


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_a_cpu_computes_in_fp32_in_3d_where_its_bf16_gradients_are_wrong(
    precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert choose_precision(precision, "cpu", 3) == "32-true"
    assert choose_precision(precision, "cuda", 3) == precision
