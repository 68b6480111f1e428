"""One step of pretraining: who moves, in which order, by what weight, from which randomness."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from medim.models.decoders import UNetDecoder
from medim.models.encoders import UNetEncoder
from medim.objectives import Term
from medim.objectives.infomax import LocalDIM
from medim.objectives.prior_matching import PriorMatching
from medim.training.pretrain.module import PretrainModule
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import UsageError, Views

SHAPE = (8, 8)
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:.*LeafSpec.*is deprecated")


def dim() -> LocalDIM:
    return LocalDIM(
        (4, 8), 6, SHAPE, (5, 11), (0.0, 0.5), (1, 2), critic={"name": "encode_and_dot", "width": 8}, occlusion=4
    )


class Scripted(nn.Module):
    """An objective with the given losses, of the summary's mean square."""

    def __init__(self, **scales: float) -> None:
        super().__init__()
        self.scales = scales
        self.dummy = nn.Parameter(torch.zeros(1))

    def forward(self, encode: Any, views: Views) -> dict[str, Term]:
        square = encode.clean.summary.square().mean() + 0 * self.dummy.sum()
        return {name: Term(scale * square, chance=1.0) for name, scale in self.scales.items()}


def module_of(objectives: dict[str, tuple[nn.Module, float]], **options: Any) -> PretrainModule:
    torch.manual_seed(0)
    optimisation = {"lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 0, "max_steps": 100}
    optimisation |= {key: options.pop(key) for key in list(options) if key in optimisation}
    options = {"decoder": None, "gradient_clip": 0.0, "seed": 0, **options}
    encoder = UNetEncoder(1, 2, channels=(4, 8), norm="bn", summary_channels=6)
    return PretrainModule(encoder, objectives=objectives, optimisation=optimisation, **options)


def batches(steps: int, count: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    items = [(torch.randn(4, count, 1, *SHAPE, generator=generator), torch.zeros(4, count, 2)) for _ in range(steps)]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


class Keep(pl.Callback):
    """Keeps what each step returned."""

    def __init__(self) -> None:
        self.terms: list[dict[str, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.terms.append({name: term.loss.item() for name, term in args[2].items() if isinstance(term, Term)})


def fit(module: PretrainModule, folder: Path, steps: int = 2, count: int = 1, **options: Any) -> list[dict[str, float]]:
    keep = Keep()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[keep],
        limit_val_batches=0,
        **options,
    )
    trainer.fit(module, batches(steps, count))
    assert trainer.global_step == steps, "an adversary's step is not counted"
    return keep.terms


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_a_step_moves_encoder_critic_and_adversary(tmp_path: Path) -> None:
    module = module_of({"local_dim": (dim(), 1.0), "prior_matching": (PriorMatching(6, hidden=(8,)), 0.1)})
    before = copies(module)
    fit(module, tmp_path)
    assert moved(module, before) == set(before)


def test_an_objective_without_weight_moves_nothing_but_its_adversary(tmp_path: Path) -> None:
    module = module_of({"fixed": (Scripted(fixed=1.0), 1.0), "prior_matching": (PriorMatching(6, hidden=(8,)), 0.0)})
    alone = module_of({"fixed": (Scripted(fixed=1.0), 1.0)})
    before = copies(module)
    fit(module, tmp_path)
    fit(alone, tmp_path)
    assert any("discriminator" in name for name in moved(module, before))
    assert moved(alone, copies(module)) == set()


def test_an_objective_without_weight_may_be_nan(tmp_path: Path) -> None:
    module = module_of({"fixed": (Scripted(fixed=1.0), 1.0), "broken": (Scripted(broken=float("nan")), 0.0)})
    fit(module, tmp_path)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_a_rate_near_zero_leaves_the_encoder_where_it_was(tmp_path: Path) -> None:
    module = module_of({"local_dim": (dim(), 1.0)}, lr=0.0, weight_decay=0.1)
    before = copies(module)
    fit(module, tmp_path)
    assert moved(module, before) == set()


def test_the_adversary_is_stepped_first_and_each_side_has_its_own_optimiser(tmp_path: Path) -> None:
    prior = PriorMatching(6, hidden=(8,))
    events: list[str] = []
    states: dict[str, torch.Tensor] = {}
    module = module_of({"prior_matching": (prior, 1.0)})
    start = prior.discriminator[0].weight.detach().clone()
    loss, forward = prior.adversary_loss, prior.forward

    def adversary_loss(encode: Any, views: Views) -> torch.Tensor:
        events.append("adversary")
        return loss(encode, views)

    def watched(encode: Any, views: Views) -> dict[str, Term]:
        events.append("encoder")
        states["seen by the encoder"] = prior.discriminator[0].weight.detach().clone()
        return forward(encode, views)

    prior.adversary_loss, prior.forward = adversary_loss, watched  # type: ignore[method-assign]
    fit(module, tmp_path, steps=1)
    assert events == ["adversary", "encoder"]
    assert not torch.equal(states["seen by the encoder"], start), "it had moved by then"
    assert torch.equal(states["seen by the encoder"], prior.discriminator[0].weight), "and is not moved again"


def test_every_parameter_belongs_to_exactly_one_optimiser() -> None:
    prior = PriorMatching(6, hidden=(8,))
    module = module_of(
        {"local_dim": (dim(), 1.0), "prior_matching": (prior, 1.0)}, decoder=UNetDecoder((4, 8), (1, 2), 2)
    )
    (main, adversary), _ = module.configure_optimizers()
    held = [[id(p) for group in o.param_groups for p in group["params"]] for o in (main, adversary)]
    assert set(held[1]) == {id(p) for p in prior.parameters()}
    assert sorted(held[0] + held[1]) == sorted(id(p) for p in module.parameters())
    assert adversary.defaults["betas"] == (0.5, 0.999)


def test_terms_carry_their_objectives_name_and_weight(tmp_path: Path) -> None:
    module = module_of({"single": (Scripted(anything=1.0), 2.0), "several": (Scripted(a=3.0, b=5.0), 0.5)})
    terms = fit(module, tmp_path, steps=1)[0]
    square = terms["single"]
    assert terms == pytest.approx({"single": square, "several/a": 3 * square, "several/b": 5 * square})
    total = module.total_loss({name: Term(torch.tensor(loss)) for name, loss in terms.items()})
    assert total.item() == pytest.approx(2 * square + 0.5 * 8 * square)


def test_the_clean_features_are_computed_once_and_shared(tmp_path: Path) -> None:
    module = module_of({"a": (Scripted(x=1.0), 1.0), "b": (PriorMatching(6, hidden=(8,)), 1.0), "c": (dim(), 1.0)})
    calls: list[torch.Size] = []
    module.encoder.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    fit(module, tmp_path, steps=1, count=2)
    assert calls == [torch.Size((8, 1, 8, 8))] * 2, "one clean pass of B * V images, one occluded"


def test_steps_differ_in_their_randomness_and_the_run_repeats(tmp_path: Path) -> None:
    def run(seed: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
        torch.manual_seed(7)
        module = module_of({"local_dim": (dim(), 1.0), "prior": (PriorMatching(6, hidden=(8,)), 1.0)}, seed=seed)
        return fit(module, tmp_path, steps=3), copies(module)

    # the objectives are made before the module's own seed is set
    torch.manual_seed(7)
    (first, weights), (again, same_weights), (other, _) = run(0), run(0), run(1)
    assert first == again
    assert all(torch.equal(weights[name], same_weights[name]) for name in weights)
    assert first != other

    module = module_of({"local_dim": (dim(), 1.0)})
    (batch,) = batches(1)
    draws = [module._prepare_views(batch, step, part)[1].generator.initial_seed() for step in (0, 1) for part in (0, 1)]
    assert len(set(draws)) == 4, "steps and splits draw apart"


def test_validation_leaves_weights_and_statistics_alone(tmp_path: Path) -> None:
    module = module_of({"local_dim": (dim(), 1.0), "prior": (PriorMatching(6, hidden=(8,)), 1.0)}).eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    (batch,) = batches(1)
    with torch.no_grad():
        one, two = module.validation_step(batch, 0), module.validation_step(batch, 0)
    assert one["summary"].shape == (4, 6)
    first, second = ({name: term.loss.item() for name, term in found["terms"].items()} for found in (one, two))
    assert first == second
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_the_gradient_is_clipped_to_its_norm_before_the_step(clip: float, tmp_path: Path) -> None:
    module = module_of({"loud": (Scripted(x=1e3), 1.0)}, gradient_clip=clip)
    fit(module, tmp_path, steps=1)
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    if clip:
        assert norm.item() == pytest.approx(clip, rel=1e-3)
    else:
        assert norm.item() > 1


def test_a_step_runs_under_bf16(tmp_path: Path) -> None:
    module = module_of({"local_dim": (dim(), 1.0), "prior": (PriorMatching(6, hidden=(8,)), 1.0)})
    before = copies(module)
    terms = fit(module, tmp_path, precision="bf16-mixed")
    assert moved(module, before) == set(before)
    assert all(torch.isfinite(torch.tensor(list(t.values()))).all() for t in terms)


class Scaler(torch.amp.GradScaler):
    """fp16 on a CPU, where Lightning has none; remembers the order of calls."""

    def __init__(self, **options: Any) -> None:
        super().__init__("cpu", **options)
        self.calls: list[str] = []

    def unscale_(self, optimizer: Any) -> None:
        self.calls.append("unscale")
        super().unscale_(optimizer)

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        self.calls.append("update")
        super().update(new_scale)


def fit_in_fp16(module: PretrainModule, folder: Path, scaler: Scaler, steps: int = 1) -> list[dict[str, float]]:
    return fit(module, folder, steps=steps, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])


def test_in_fp16_both_optimisers_step_through_the_scaler_and_the_scale_is_updated_once(tmp_path: Path) -> None:
    module = module_of({"local_dim": (dim(), 1.0), "prior": (PriorMatching(6, hidden=(8,)), 1.0)})
    before, scaler = copies(module), Scaler(init_scale=256.0)
    terms = fit_in_fp16(module, tmp_path, scaler, steps=2)
    assert moved(module, before) == set(before)
    assert all(torch.isfinite(torch.tensor(list(t.values()))).all() for t in terms)
    assert scaler.calls == ["unscale", "step", "unscale", "step", "update"] * 2


def test_in_fp16_the_clip_sees_the_gradient_without_its_scale(tmp_path: Path) -> None:
    norms = {}
    for name, clip in (("clipped", 1e-3), ("free", 1e9)):
        module = module_of({"loud": (Scripted(x=1.0), 1.0)}, gradient_clip=clip)
        fit_in_fp16(module, tmp_path, Scaler(init_scale=256.0))
        norms[name] = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()
    assert norms["clipped"] == pytest.approx(1e-3, rel=1e-2)
    module = module_of({"loud": (Scripted(x=1.0), 1.0)})
    fit(module, tmp_path, steps=1)
    plain = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm().item()
    assert norms["free"] == pytest.approx(plain, rel=0.05)


def test_in_fp16_a_step_whose_gradient_overflows_is_left_out_and_the_scale_falls(tmp_path: Path) -> None:
    module, scaler = module_of({"loud": (Scripted(x=1.0), 1.0)}), Scaler(init_scale=2.0**120)
    before = copies(module)
    fit_in_fp16(module, tmp_path, scaler)
    assert moved(module, before) == set()
    assert scaler.get_scale() == 2.0**119


def test_a_compiled_module_keeps_the_names_and_the_number_of_its_parameters() -> None:
    made = (module_of({"local_dim": (dim(), 1.0)}, compile_networks=compiled) for compiled in (False, True))
    plain, compiled = (list(module.state_dict()) for module in made)
    assert plain == compiled


def test_a_compiled_run_computes_what_a_plain_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = partial(torch.compile, backend="eager")  # the code generator is torch's, takes a minute and is benchmarked
    monkeypatch.setattr(torch, "compile", traced)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = module_of({"local_dim": (dim(), 1.0)}, compile_networks=compiled, lr=1e-3)
        losses.append([terms["local_dim"] for terms in fit(module, tmp_path, steps=3)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_chunks_reach_the_encoder_in_training_and_in_validation(tmp_path: Path) -> None:
    sizes: list[int] = []
    torch.manual_seed(0)
    encoder = UNetEncoder(1, 2, channels=(4, 8), norm="in", summary_channels=6)
    encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    optimisation = {"lr": 1e-2, "weight_decay": 0.0, "warmup_steps": 0, "max_steps": 1}
    given: dict[str, Any] = {"optimisation": optimisation, "gradient_clip": 0.0, "seed": 0, "chunk": 3}
    module = PretrainModule(encoder, None, {"x": (Scripted(x=1.0), 1.0)}, **given)
    fit(module, tmp_path, steps=1)
    assert sizes == [3, 1, 1, 3], "forward, and once more backwards"
    sizes.clear()
    with torch.no_grad():
        module.validation_step(next(iter(batches(1))), 0)
    assert sizes == [3, 1]


def test_an_objective_that_decodes_says_what_the_config_lacks() -> None:
    (batch,) = batches(1)
    encoder = UNetEncoder(1, 2, channels=(4, 8))
    step = StepEncoder(encoder, None, Views(*batch), torch.Generator())
    with pytest.raises(UsageError, match="needs a decoder; add one"):
        step.decode(step.clean)
    decoding = StepEncoder(encoder, UNetDecoder((4, 8), (1, 2), 2), Views(*batch), torch.Generator())
    assert decoding.decode(decoding.clean).shape == (4, 4, *SHAPE)
