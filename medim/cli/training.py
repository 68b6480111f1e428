"""Commands that train and plan training: `pretrain`, `finetune`, `plan`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medim.cli.options import (
    ConfigOption,
    DataOption,
    DeviceOption,
    DevicesOption,
    FailOnContaminationOption,
    ImageColumnOption,
    KeepNamesOption,
    LabelColumnOption,
    LabelsOption,
    ModalityOption,
    NodesOption,
    NoOodOption,
    OutOption,
    OverwriteOption,
    PrecisionOption,
    PreprocessingJobsOption,
    PublicKeyOption,
    ResumeOption,
    SeedOption,
    SetOption,
    SplitSeedOption,
    SubjectColumnOption,
    SubjectsOption,
    WhereOption,
    check_modality,
    require_modality,
)
from medim.cli.sources import read_source, show_source
from medim.cli.terminal import format_intervals, format_loss, format_or_dash, print_result
from medim.console.progress import format_duration
from medim.signals import handle_shutdown_signals
from medim.tasks import TASK_OPTIONS
from medim.types import UsageError, UserError

if TYPE_CHECKING:
    from medim.training.finetune.summary import FinetuneSummary
    from medim.training.plan.estimate import PlanEstimate


@dataclass(frozen=True, kw_only=True)
class PretrainArguments:
    """Command-line arguments of `medim pretrain`."""

    modality: ModalityOption = None
    data: DataOption = None
    config: ConfigOption = None
    set_: SetOption = None
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the run. Default: runs/<preset>-<hash>.")
    ] = None
    jobs: PreprocessingJobsOption = 1
    seed: SeedOption = 0
    split_seed: SplitSeedOption = 0
    resume: ResumeOption = False
    overwrite: OverwriteOption = False
    device: DeviceOption = "auto"
    devices: DevicesOption = None
    nodes: NodesOption = None
    precision: PrecisionOption = None
    stop_on_collapse: Annotated[
        bool, typer.Option("--stop-on-collapse", help="Stop the run if it diverges or collapses.")
    ] = False
    no_ood: NoOodOption = False
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None


@handle_shutdown_signals()
def pretrain(arguments: PretrainArguments) -> None:
    """Pretrain an encoder on unlabelled images."""
    from medim.training.auto_config import describe_input
    from medim.training.engine.launch import is_main_process
    from medim.training.pretrain.config import resolve_pretrain_config
    from medim.training.pretrain.options import PretrainOptions
    from medim.training.pretrain.run import pretrain as run

    config_args = _select_config(arguments), _list_overrides(arguments)
    settings = resolve_pretrain_config(*config_args)  # a mistake in it shows before images are read
    check_modality(settings.modality, arguments.modality, arguments.config)
    image_index, store = read_source(arguments, settings.modality, show=False)
    settings = resolve_pretrain_config(*config_args, index=image_index)
    folder = arguments.out or Path("runs") / f"{settings.name}-{settings.hash}"
    if is_main_process():
        show_source(arguments, image_index, folder)
    options = PretrainOptions(
        seed=arguments.seed,
        split_seed=arguments.split_seed,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        accelerator=arguments.device,
        devices=arguments.devices,
        nodes=arguments.nodes,
        stop_on_collapse=arguments.stop_on_collapse,
        store=store,
        jobs=arguments.jobs,
        fit_ood_detector=not arguments.no_ood,
    )
    summary = run(settings, image_index, folder, options)
    if is_main_process():
        with _check_summary(folder, is_resumed=arguments.resume):
            lines = _format_pretraining(summary)
        print_result("pretrain", lines | describe_input(settings, image_index) | {"written to": folder})


def _format_pretraining(summary: dict[str, Any]) -> dict[str, Any]:
    """Format verdict, losses, diagnostics and costs as lines."""
    diagnostics = summary["diagnostics"]
    losses = {name: format_loss(loss, summary["chance"][name]) for name, loss in summary["loss"].items()}
    diagnostic_lines = {
        name: f"{format_or_dash(v['last'])}, held out {format_or_dash(v['val'])}" for name, v in diagnostics.items()
    }
    is_learning = summary["verdict"] == "learning"
    verdict_details = {} if is_learning else {"reason": summary["verdict_reason"], "advice": summary["advice"]}
    result_rows = {
        "verdict": summary["verdict"],
        **verdict_details,
        **losses,
        **diagnostic_lines,
        "rankme": summary["rankme"],
        "feature std": summary["feature_std"],
    }
    costs = {"seconds per step": summary["seconds_per_step"], "peak memory, MiB": summary["peak_memory_bytes"] / 2**20}
    return {**result_rows, **costs}


@dataclass(frozen=True, kw_only=True)
class FinetuneArguments:
    """Command-line arguments of `medim finetune`."""

    task: Annotated[str, typer.Option(help="Prediction task.", metavar=f"[{'|'.join(TASK_OPTIONS)}]")]
    out: OutOption
    data: DataOption = None
    encoder: Annotated[str, typer.Option(metavar="RUN", help="A pretraining run or package. none: fresh weights.")] = (
        "none"
    )
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the network of the encoder from fresh weights, as a baseline.")
    ] = False
    modality: ModalityOption = None
    labelled: Annotated[int | None, typer.Option(metavar="N", help="Label budget in images.")] = None
    label_fraction: Annotated[
        float | None,
        typer.Option(metavar="FRACTION", help="Label budget as a fraction of the labelled training images."),
    ] = None
    labels: LabelsOption = None
    image_column: ImageColumnOption = None
    label_column: LabelColumnOption = None
    subject_column: SubjectColumnOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    config: ConfigOption = None
    set_: SetOption = None
    seed: SeedOption = 0
    split_seed: SplitSeedOption = 0
    resume: ResumeOption = False
    overwrite: OverwriteOption = False
    fail_on_contamination: FailOnContaminationOption = False
    public_key: PublicKeyOption = None
    device: DeviceOption = "auto"
    jobs: PreprocessingJobsOption = 1
    no_ood: NoOodOption = False


@handle_shutdown_signals()
def finetune(arguments: FinetuneArguments) -> None:
    """Fine-tune an encoder on labelled images.

    With --from-scratch, the same network is trained from fresh weights.
    """
    from medim.data.contamination import describe_counts as describe_contamination
    from medim.integrity import require_signature
    from medim.training.auto_config import describe_input
    from medim.training.finetune.config import resolve_finetune_config
    from medim.training.finetune.options import FinetuneOptions
    from medim.training.finetune.run import finetune as run

    encoder_path = None if arguments.encoder == "none" else Path(arguments.encoder)
    if arguments.from_scratch and encoder_path is None:
        raise UsageError(
            "--from-scratch: requires --encoder RUN, whose architecture it uses. For a new network, omit "
            "--from-scratch."
        )
    require_signature(encoder_path, arguments.public_key)
    modality = arguments.modality
    if modality is None and encoder_path is None and arguments.config is None:
        modality = require_modality(arguments.data)
    config_args = arguments.task, modality, encoder_path, arguments.config, arguments.set_ or []
    options = FinetuneOptions(
        encoder=encoder_path,
        from_scratch=arguments.from_scratch,
        labelled=arguments.labelled,
        label_fraction=arguments.label_fraction,
        seed=arguments.seed,
        split_seed=arguments.split_seed,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        fail_on_contamination=arguments.fail_on_contamination,
        accelerator=arguments.device,
        jobs=arguments.jobs,
        fit_ood_detector=not arguments.no_ood,
    )
    settings = resolve_finetune_config(*config_args)  # mistakes in options and configuration show before reading
    check_modality(settings.modality, arguments.modality, arguments.config)
    image_index, store = read_source(arguments, settings.modality, out=arguments.out)
    settings = resolve_finetune_config(*config_args, index=image_index)
    summary = run(settings, image_index, arguments.out, options, store=store)
    with _check_summary(arguments.out, is_resumed=arguments.resume):
        start = {"start": summary["init"]}
        contamination = {} if summary["init"] == "scratch" else describe_contamination(summary["contamination"])
        lines = {**_format_labels(summary), **start, **contamination, **describe_input(settings, image_index)}
        lines |= format_intervals(summary["val"] or {})
    print_result("finetune", {**lines, "written to": arguments.out, **_suggest_comparison(arguments.out)})


@contextmanager
def _check_summary(out: Path, *, is_resumed: bool) -> Iterator[None]:
    """Report a damaged summary of a finished run, whose lines are formatted inside the block.

    Raises:
        UserError: a value is missing or of another type, and the run was finished before this command.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if not is_resumed:
            raise
        raise UserError(
            f"{out / 'summary.json'}: expected the summary of a finished run, which is damaged. Delete this file and "
            "run the command again."
        ) from error


def _suggest_comparison(out: Path) -> dict[str, str]:
    """Suggest the report on the folder of a run, if it contains other runs."""
    folder = out.resolve().parent
    others = [path for path in folder.glob("*/summary.json") if path.parent != out.resolve()]
    return {"compare with other runs": f"medim report {out.parent}"} if others else {}


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """Command-line arguments of `medim plan`."""

    modality: ModalityOption = None
    data: DataOption = None
    config: ConfigOption = None
    set_: SetOption = None
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder of the planned run, whose disk is checked. Default: runs/."),
    ] = None
    split_seed: SplitSeedOption = 0
    device: DeviceOption = "auto"
    precision: PrecisionOption = None
    subjects: SubjectsOption = None
    keep_names: KeepNamesOption = False
    where: WhereOption = None
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the estimate to this JSON file.")
    ] = None


def plan(arguments: PlanArguments) -> None:
    """Estimate time, memory and disk space of a pretraining run.

    A few real steps are measured.
    """
    from medim.files import write_json
    from medim.training.auto_config import describe_input
    from medim.training.plan.plan import check_plan
    from medim.training.plan.plan import plan_pretraining as run
    from medim.training.pretrain.config import resolve_pretrain_config

    config_args = _select_config(arguments), _list_overrides(arguments)
    settings = resolve_pretrain_config(*config_args)  # a mistake in it shows before images are read
    check_modality(settings.modality, arguments.modality, arguments.config)
    image_index, store = read_source(arguments, settings.modality)
    settings = resolve_pretrain_config(*config_args, index=image_index)
    estimate = run(
        settings,
        image_index,
        arguments.out or Path("runs"),
        split_seed=arguments.split_seed,
        accelerator=arguments.device,
        store=store,
    )
    if arguments.json:
        write_json(arguments.json, estimate)
    check_plan(estimate)
    print_result("plan", {**_format_plan(estimate), **describe_input(settings, image_index)})


def sync(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs with unsent tracking records.")],
) -> None:
    """Send unsent tracking records of runs to MLflow.

    Records are unsent if the MLflow server was not reachable during the run. If a run fails, the others are sent.
    """
    from medim.tracking.tracking import sync_pending

    results, errors = {}, []
    for run in runs:
        try:
            results[str(run)] = f"{sync_pending(run)} records sent"
        except UsageError:  # tracking is off
            raise
        except UserError as error:
            results[str(run)] = "not sent"
            errors.append(str(error))
    print_result("sync", results)
    if errors:
        raise UserError("\n".join(errors))


def _format_labels(summary: FinetuneSummary) -> dict[str, str]:
    """Format the number of labelled images, and the classes with their numbers of images."""
    counts = [f"{name} {count['train']} + {count['val']}" for name, count in summary["class_images"].items()]
    classes = {"classes": f"{len(counts)}, with training + validation images: {', '.join(counts)}"} if counts else {}
    return {"labelled images": str(summary["n_labelled"]), **classes}


def _list_overrides(arguments: PretrainArguments | PlanArguments) -> list[str]:
    """List the overrides of the configuration: those of `--set`, then that of `--precision`."""
    return [*(arguments.set_ or []), *([f"precision={arguments.precision}"] if arguments.precision else [])]


def _select_config(arguments: PretrainArguments | PlanArguments) -> str:
    """Select the name of the configuration: `--config`, or the preset of the modality."""
    return arguments.config or arguments.modality or require_modality(arguments.data)


def _format_plan(estimate: PlanEstimate) -> dict[str, str]:
    """Format the estimate as lines."""
    phase_seconds = {part: seconds for part, seconds in estimate["seconds"].items() if part != "total"}
    disk, free, hints = estimate["disk_bytes"], estimate["available"], estimate["suggestions"]
    largest_sizes = [f"a batch of {hints['batch_size']}"] if hints["batch_size"] else []
    largest_sizes += [f"views of {'x'.join(map(str, hints['views']))}"] if hints["views"] else []
    loads_in_workers = estimate["memory_bytes"] > estimate["peak_memory_bytes"]
    worker_text = f", {_format_gibibytes(estimate['memory_bytes'])} with loading processes" if loads_in_workers else ""
    return {
        "hours": f"{estimate['hours']:.3g} ("
        + ", ".join(f"{part.replace('_', ' ')} {format_duration(seconds)}" for part, seconds in phase_seconds.items())
        + ")",
        "seconds per step": f"{estimate['seconds_per_step']:.3g}, of {estimate['measured_steps']} steps "
        f"of {estimate['measured_batch_size']} images",
        "peak memory": f"{_format_gibibytes(estimate['peak_memory_bytes'])}{worker_text}; "
        f"{_format_gibibytes(free['memory'])} free",
        "disk": f"{_format_gibibytes(disk['total'])} (store {_format_gibibytes(disk['store'])}, "
        f"checkpoints {_format_gibibytes(disk['checkpoints'])}, run "
        f"{_format_gibibytes(disk['run'])}); {_format_gibibytes(free['disk'])} free",
        "would fit too": " or ".join(largest_sizes) + ", by proportion" if largest_sizes else "-",
    }


def _format_gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
