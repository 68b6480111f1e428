"""Claims: objectives have little overhead, and are faster than the implementation of most DIM tutorials.

floors: time of a step (forward and backward) relative to its floor: forward and backward pass of encoder and decoder on
    the required images, and the products, norms and softmax of the objective (`floors.py`). At most 1.25 for
    `local_dim` with 64 images in 2D and 16 in 3D.
tutorial: time and added memory of `local_dim` with all pairs, relative to the tutorial's form on the same network.
infonce: memory of the bound of 256 images with 4096 locations, in GB beyond scores and their gradient; at most 0.3.
widths: effect of wider critics on a frozen linear probe, and their cost; only run if requested.

Ratios are measured by alternating calls in one process in fp32: median, lowest and highest.

    python benchmarks/objectives.py --out objectives.json
    python benchmarks/objectives.py --out widths.json --parts widths --data pneumoniamnist.npz
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from floors import build_floor_parts
from replay import record_passes
from timing import Ratio, RunParts, call_in_process, format_ratio, measure_added_memory, measure_ratios
from torch import nn
from torch.nn import functional as F

from medim.config import PretrainConfig, load_config
from medim.data.index.index import build_index
from medim.evaluation.probing.label_budget import Budget
from medim.evaluation.probing.probe import ProbeOptions, probe
from medim.files import write_json
from medim.objectives.mutual_information import infonce
from medim.objectives.objective import encoder_info
from medim.training.pretrain.run import pretrain

SMALL = (
    *("local-dim", "global-dim", "local-global", "prior-matching", "coordinates", "relative-coordinates", "amdim"),
    *("simclr", "cpc", "vae", "beta-vae", "reconstruction", "dense-dim"),
)
LOCAL_DIM = {"dim-local-infonce": 64, "xray-28": 64, "test-2d-local-dim": 64, "test-3d-local-dim": 16, "mri-crop": 16}
ALL_PAIRS = "objectives=[{name: local_dim, estimator: jsd, critic: {name: encode_and_dot, width: 512}}]"
WIDTHS = (64, 128, 256, 512, 1024, 2048)


def main() -> None:
    """Run the requested parts; print and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("objectives.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["floors", "tutorial", "infonce"])
    parser.add_argument("--rounds", type=int, default=7, help="pairs of calls per ratio")
    parser.add_argument("--images", type=int, default=64, help="tutorial: images per batch")
    parser.add_argument("--data", type=Path, help="widths: X-ray data set, pneumoniamnist.npz")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--preset", default="xray-28", help="widths: preset with local_dim as first objective")
    parser.add_argument("--steps", type=int, default=400, help="widths: pretraining steps")
    arguments = parser.parse_args()
    results = {name: PARTS[name](arguments) for name in arguments.parts}
    write_json(arguments.out, {"schema_version": 1, "threads": torch.get_num_threads(), **results})


def compare_floors(arguments: argparse.Namespace) -> dict[str, Ratio]:
    """Measure step over floor for `local_dim` at the sizes of the claim, and for all test presets."""
    cases = {
        f"local_dim of {preset}, {size} images": select_local_dim(preset, size) for preset, size in LOCAL_DIM.items()
    }
    cases |= {
        name: load_config("pretrain", name) for dims in (2, 3) for name in (f"test-{dims}d-{kind}" for kind in SMALL)
    }
    results = {}
    for name, config in cases.items():
        run = RunParts.from_config(config)
        results[name] = measure_ratios({"floor": build_floor(run, config), "step": run.step}, arguments.rounds)["step"]
        print(f"{name:42} step / floor {format_ratio(results[name])}", flush=True)
    return results


def select_local_dim(preset: str, images: int) -> PretrainConfig:
    """Load a preset with `local_dim` as its only objective."""
    config = load_config("pretrain", preset, [f"batch_size={images}"])
    sections = [section for section in config.objectives if section["name"] == "local_dim"]
    return config.model_copy(update={"objectives": sections})


def build_floor(run: RunParts, config: PretrainConfig) -> Callable[[], None]:
    """Build the floor of a step: its passes through encoder and decoder, and the arithmetic of each objective."""
    passes = record_passes(run)
    images, count, channels, *shape = run.views.image.shape
    views: dict[str, Any] = {"in_channels": channels, "spatial_dims": len(shape), "input_shape": tuple(shape)}
    sizes: dict[str, Any] = encoder_info(run.encoder, run.decoder, **views) | {"images": images, "view_count": count}
    floor_parts = [part for section in config.objectives for part in build_floor_parts(section, **sizes)]
    parts: list[Callable[[], object]] = [*passes, *floor_parts]

    def run_floor() -> None:
        for parameter in run.parameters():
            parameter.grad = None
        for part in parts:
            part()

    return run_floor


def compare_tutorial(arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare all-pairs `local_dim` with the tutorial's form; both include the encoder."""
    forms = {"tutorial": build_tutorial_step, "ours": build_all_pairs_step}
    steps = {name: form(arguments.images) for name, form in forms.items()}
    time = measure_ratios(steps, max(2, arguments.rounds // 2))["ours"]
    peaks = {name: call_in_process(measure_form_memory, name, arguments.images) for name in forms}
    memory = peaks["ours"] / peaks["tutorial"]
    gigabytes = ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in peaks.items())
    print(
        f"all pairs / tutorial, {arguments.images} images: time {format_ratio(time)}, memory {memory:.2f} ({gigabytes})"
    )
    return {"images": arguments.images, "time": time, "memory": memory, "bytes": peaks}


def measure_form_memory(form: str, images: int) -> int:
    """Measure the memory that a step of one form adds, in bytes."""
    return measure_added_memory({"tutorial": build_tutorial_step, "ours": build_all_pairs_step}[form](images))


def build_all_pairs_step(images: int) -> Callable[[], None]:
    """Build a step of `local_dim` with all pairs on the tutorial's network."""
    return RunParts.from_config(load_config("pretrain", "dim-tutorial", [f"batch_size={images}", ALL_PAIRS])).step


def build_tutorial_step(images: int) -> Callable[[], None]:
    """Build a step of the tutorial's form: the summary is repeated over the map, with one rolled negative.

    Follows the local term of DuaneNielsen/DeepInfomaxPytorch (models.py, train.py).
    """
    run = RunParts.from_config(load_config("pretrain", "dim-tutorial", [f"batch_size={images}", ALL_PAIRS]))
    sizes = (run.encoder.channels[1] + run.encoder.summary_channels, 512, 512, 1)
    first, second, last = (nn.Conv2d(a, b, 1) for a, b in pairwise(sizes))

    def score_map(map_: torch.Tensor, summary: torch.Tensor) -> torch.Tensor:
        summary_map = summary[:, :, None, None].expand(-1, -1, *map_.shape[2:])
        output: torch.Tensor = last(F.relu(second(F.relu(first(torch.cat([map_, summary_map], dim=1))))))
        return output

    def run_step() -> None:
        for parameter in (p for part in (run.encoder, first, second, last) for p in part.parameters()):
            parameter.grad = None
        features = run.encoder(run.views.image.flatten(0, 1))
        map_ = features.maps[1]
        other_map = torch.cat([map_[1:], map_[:1]])
        joint = -F.softplus(-score_map(map_, features.summary)).mean()
        marginal = F.softplus(score_map(other_map, features.summary)).mean()
        torch.autograd.backward(marginal - joint)

    return run_step


def report_infonce_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Measure and print the memory of InfoNCE beyond scores and gradient, in GB."""
    gigabytes = call_in_process(measure_infonce_memory, 256, 4096) / 1e9
    print(f"infonce, 256 images of 4096 locations: {gigabytes:.2f} GB beyond scores and gradient")
    return {"gb_beyond_scores_and_gradient": gigabytes}


def measure_infonce_memory(images: int, locations: int) -> int:
    """Measure the memory of forward and backward pass of the bound beyond the gradient, in bytes."""
    scores = torch.randn(images, 1, images, locations, requires_grad=True)
    return measure_added_memory(lambda: torch.autograd.backward(infonce(scores))) - scores.nbytes


def compare_widths(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure a frozen linear probe with 10 % of the labels (five subsets), and step over encoder, for each width.

    The batch size is 32, because the widest critics are slow. Pretraining uses one seed.
    """
    if arguments.data is None:
        raise SystemExit("widths: specify --data pneumoniamnist.npz.")
    index, rows = build_index(arguments.data, "xray", keep_names=True), []
    print("width  AUROC (sd)      balanced accuracy (sd)  step / encoder")
    for width in arguments.widths:
        config = load_config("pretrain", arguments.preset, list_width_overrides(width, arguments.steps))
        run = RunParts.from_config(config)
        (encoder,) = record_passes(run)
        cost = measure_ratios({"encoder": encoder, "step": run.step}, 5)["step"]
        with tempfile.TemporaryDirectory() as folder:
            run_folder, store = Path(folder) / "run", arguments.out.parent / "store"
            pretrain(config, index, run_folder, store=store)
            options = ProbeOptions(budgets=[Budget(fraction=0.1)], seeds=range(5), store=store, baselines=False)
            summary = probe(run_folder, index, Path(folder) / "probe", options)["summary"][0]
        metrics = {name: summary[name] for name in ("auroc", "balanced_accuracy")}
        rows.append({"width": width, "step_over_encoder": cost, **metrics})
        auroc, accuracy = (f"{m['mean']:.3f} ({m['sd']:.3f})" for m in metrics.values())
        print(f"{width:5}  {auroc:14}  {accuracy:22}  {format_ratio(cost)}", flush=True)
    return rows


def list_width_overrides(width: int, steps: int) -> list[str]:
    """List the changes of a preset for a short run with a given critic width."""
    length = [f"max_steps={steps}", f"warmup_steps={steps // 10}", f"checkpoint_every_steps={steps}"]
    return [*length, "batch_size=32", f"objectives.0.critic.width={width}"]


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "floors": compare_floors,
    "tutorial": compare_tutorial,
    "infonce": report_infonce_memory,
    "widths": compare_widths,
}


if __name__ == "__main__":
    main()
