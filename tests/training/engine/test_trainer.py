from __future__ import annotations

import pytest
import torch

from medim.training.engine.trainer import choose_precision


@pytest.mark.parametrize(("arithmetic", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bf16_is_used_on_a_cpu_only_where_it_has_the_arithmetic(
    arithmetic: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arithmetic)
    assert choose_precision("bf16-mixed", "cpu") == used
    assert choose_precision("32-true", "cpu") == "32-true"
    assert choose_precision("bf16-mixed", "cuda") == "bf16-mixed"


@pytest.mark.parametrize(("arithmetic", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_fp16_is_for_gpus_and_a_cpu_takes_what_it_has(
    arithmetic: bool, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: arithmetic)
    assert choose_precision("16-mixed", "cpu") == used
    assert choose_precision("16-mixed", "cuda") == "16-mixed"
