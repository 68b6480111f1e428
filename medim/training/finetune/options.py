"""Options of a fine-tuning run that the configuration does not contain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medim.data.loading.cohort import Cohort
from medim.data.loading.splits import check_label_budget


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Initial weights, label budget, seeds, and the handling of the output folder.

    Attributes:
        encoder: pretraining run or package with the initial weights of the encoder and, if it has one, of the decoder;
            None: fresh weights.
        from_scratch: take the encoder's architecture and preprocessing, not its weights.
        labelled: label budget in images.
        label_fraction: label budget as a share of the labelled training images.
        seed: random seed of fresh weights, batches and augmentation.
        subset_seed: random seed of the draw of the label budget; None: `seed`.
        split_seed: random seed of the split by subject.
        resume: continue from the newest checkpoint in the run's folder.
        overwrite: empty the run's folder first.
        accelerator: device kind, in the terms of Lightning.
        store: folder of preprocessed images; None: the user's cache.
        jobs: number of processes that preprocess images which are not in the store.
        fail_on_contamination: refuse if the encoder or the training split contains an image or subject of the
            validation split.
        cohort: result of `open_labelled_cohort` for this index, shared by several runs; `store` is then not used.
        parent_run: MLflow id of the study that this run belongs to.
        fit_ood_detector: whether to fit an out-of-distribution detector for a package, see `medim.training.fit_ood`.

    Raises:
        UsageError: both budgets are given, or one is out of range.
    """

    encoder: Path | None = None
    from_scratch: bool = False
    labelled: int | None = None
    label_fraction: float | None = None
    seed: int = 0
    subset_seed: int | None = None
    split_seed: int = 0
    resume: bool = False
    overwrite: bool = False
    accelerator: str = "auto"
    store: Path | None = None
    jobs: int = 1
    fail_on_contamination: bool = False
    cohort: Cohort | None = None
    parent_run: str | None = None
    fit_ood_detector: bool = True

    def __post_init__(self) -> None:
        """Reject a label budget that is out of range."""
        check_label_budget(self.labelled, self.label_fraction)

    @property
    def label_seed(self) -> int:
        """Seed of the draw of the label budget."""
        return self.seed if self.subset_seed is None else self.subset_seed

    @property
    def initial_weights(self) -> Path | None:
        """Run or package whose weights the model starts from; None for fresh weights."""
        return None if self.from_scratch else self.encoder
