"""Lightning module of pretraining, independent of the method: each method is an objective."""

from __future__ import annotations

from typing import Any, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.optim import Adam

from medim.objectives import Term
from medim.training.engine.gather import GatheredViews
from medim.training.engine.gradient_cache import check_chunk_support
from medim.training.engine.gradients import clip_gradients, gradient_norms, unscale_fused_gradients
from medim.training.engine.optim import build_optimiser
from medim.training.engine.process_group import SINGLE_PROCESS, ProcessGroup
from medim.training.engine.sampler import derive_seed
from medim.training.pretrain.step_encoder import StepEncoder
from medim.types import Views

ViewBatch = tuple[torch.Tensor, torch.Tensor]


class ValidationOutput(TypedDict):
    """Result of one validation step."""

    terms: dict[str, Term]
    summary: torch.Tensor  # (N, summary_channels)


class PretrainModule(pl.LightningModule):
    """Training of an encoder (and decoder) with a weighted list of objectives.

    Each step first updates the adversaries (own optimiser, encoder detached), then encoder, critics and heads with the
    weighted sum of all terms.

    Args:
        encoder: the encoder.
        decoder: decoder shared by the objectives that need one, or None.
        objectives: (objective, weight) by name.
        optimisation: arguments of `medim.training.engine.optim.build_optimiser`, for encoder, critics and heads.
        adversary_lr: learning rate of Adam for adversaries, with the betas of the code by the authors of DIM (0.5,
            0.999).
        chunk: images per chunk of encoder and decoder; see `medim.training.engine.gradient_cache`.
        compile_networks: whether to use torch.compile for encoder and decoder.
        gradient_clip: largest gradient norm; 0 disables clipping.
        seed: random seed of the run, from which those of the steps are derived.
        group: the processes of the run. A training batch is the part of this process; a validation batch is whole in
            each process.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module | None,
        objectives: dict[str, tuple[nn.Module, float]],
        *,
        optimisation: dict[str, Any],
        gradient_clip: float,
        seed: int,
        adversary_lr: float = 1e-4,
        group: ProcessGroup = SINGLE_PROCESS,
        chunk: int | None = None,
        compile_networks: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = encoder
        self.decoder = decoder
        self.objectives = nn.ModuleDict({name: objective for name, (objective, _) in objectives.items()})
        self.weights = {name: weight for name, (_, weight) in objectives.items()}
        self._adversarial_objectives: list[Any] = [
            o for o in self.objectives.values() if hasattr(o, "adversary_parameters")
        ]
        self._optimisation = optimisation
        self._adversary_lr = adversary_lr
        self._clip = gradient_clip
        self._seed = seed
        self._group = group
        self._gradient_norms: dict[str, torch.Tensor] = {}
        check_chunk_support(chunk, encoder, decoder)
        self._chunk = chunk
        parts = (encoder, decoder)  # a tuple, because a list of compiled modules would be registered again
        self._networks: Any = tuple(
            torch.compile(part) if compile_networks and part is not None else part for part in parts
        )

    def configure_optimizers(self) -> Any:
        """Build the main optimiser, and Adam for the adversaries."""
        adversary = [p for objective in self._adversarial_objectives for p in objective.adversary_parameters()]
        adversary_ids = {id(p) for p in adversary}
        main_parameters = nn.ParameterList(p for p in self.parameters() if id(p) not in adversary_ids)
        main, schedule = build_optimiser([(main_parameters, 1.0)], **self._optimisation)
        optimisers = [main] + ([Adam(adversary, lr=self._adversary_lr, betas=(0.5, 0.999))] if adversary else [])
        return optimisers, [schedule]

    def training_step(self, batch: ViewBatch, step: int) -> dict[str, Term | dict[str, torch.Tensor]]:
        """Perform one step; return the terms, and `gradient_norms` before clipping, for the callbacks."""
        views, encode = self._prepare_views(batch, self.global_step, split=0)
        optimisers = self.optimizers(use_pl_optimizer=True)
        main, *adversaries = optimisers if isinstance(optimisers, list) else [optimisers]
        if adversaries:
            self._take_step(
                sum(o.adversary_loss(encode, views) for o in self._adversarial_objectives), adversaries[0].optimizer
            )
        terms = self._compute_terms(encode, views)
        self._take_step(self.total_loss(terms), main)
        schedule: Any = self.lr_schedulers()
        schedule.step()
        return {**terms, "gradient_norms": self._gradient_norms}

    def validation_step(self, batch: ViewBatch, index: int) -> ValidationOutput:
        """Compute the `terms` on validation images, and their `summary` (N, summary_channels)."""
        views, encode = self._prepare_views(batch, index, split=1)
        return {"terms": self._compute_terms(encode, views), "summary": encode.clean.summary}

    def total_loss(self, terms: dict[str, Term]) -> torch.Tensor:
        """Sum the terms with their weights; the name of a term begins with that of its objective.

        Objectives of weight 0 are only measured: their terms are left out, as 0 times NaN is NaN.
        """
        weights = {name: self.weights[name.partition("/")[0]] for name in terms}
        return torch.stack([weight * terms[name].loss for name, weight in weights.items() if weight]).sum()

    def _compute_terms(self, encode: StepEncoder, views: Views) -> dict[str, Term]:
        terms = {}
        for name, objective in self.objectives.items():
            objective_terms = objective(encode, views)
            terms.update(
                {
                    name if len(objective_terms) == 1 else f"{name}/{term}": value
                    for term, value in objective_terms.items()
                }
            )
        return terms

    def _take_step(self, loss: Any, optimiser: Any) -> None:
        optimiser.zero_grad()
        self.manual_backward(loss)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if isinstance(optimiser, LightningOptimizer):  # counts the step, and applies the loss scaler if there is one
            optimiser.step()
        elif scaler is not None:
            scaler.unscale_(optimiser)
            self._clip_gradient(optimiser)
            scaler.step(optimiser)  # the step of the main optimiser updates the scale
        else:
            self._clip_gradient(optimiser)
            optimiser.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Measure and clip the gradient of the main optimiser, after unscaling."""
        unscale_fused_gradients(optimizer, getattr(self.trainer.precision_plugin, "scaler", None))
        self._clip_gradient(optimizer)

    def _clip_gradient(self, optimiser: Any) -> None:
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        self._gradient_norms = gradient_norms(
            {"encoder": self.encoder, "decoder": self.decoder, **self.objectives}, parameters
        )
        clip_gradients(optimiser, self._clip)

    def _prepare_views(self, batch: ViewBatch, step: int, split: int) -> tuple[Views, StepEncoder]:
        generator = torch.Generator().manual_seed(derive_seed(self._seed, step, split, 2))
        views = Views(*batch)
        if self._group.count > 1 and split == 0:
            views = GatheredViews(views, self._group)
        encoder, decoder = self._networks
        return views, StepEncoder(encoder, decoder, views, generator, self._group, chunk=self._chunk)
