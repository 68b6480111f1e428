"""Links between MLflow runs: from a package or a measurement to its model and to the encoder that it started from.

A run has the tag `medim.weights.sha256` or `medim.package.sha256` of the files that it made. A later run that uses such
files has the tags `medim.<step>.sha256` and, if the server has the run that made them, `medim.<step>.run_id`, also for
the steps before. Its description lists these runs as links. The weights are also MLflow's logged models: output of
the run that made them, and input of the runs that use them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from medim.files import read_json
from medim.tracking.outbox import STATE
from medim.types import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
WEIGHTS_TAG, PACKAGE_TAG = "medim.weights.sha256", "medim.package.sha256"  # digests of the files that a run made
MODEL_ID_TAG = "medim.logged_model_id"  # logged model of these weights
STUDY_EXPERIMENT = "medim-study"  # experiment of all studies
STEPS: dict[str, tuple[str, tuple[str, ...], str]] = {  # step: title, experiments of its runs, tag with the digest
    "encoder": ("Pretraining", ("medim-pretrain",), WEIGHTS_TAG),
    "model": ("Fine-tuning", ("medim-finetune", STUDY_EXPERIMENT), WEIGHTS_TAG),
    "evaluation": ("Evaluation", ("medim-evaluate",), "medim.model.sha256"),
    "package": ("Package", ("medim-export",), PACKAGE_TAG),
}
NOTE_TAG = "mlflow.note.content"  # description of a run, in Markdown
NOTE_TITLE = "### Lineage"
MAX_LINKS = 10  # runs per step in a description
_DIGEST, _RUN_ID = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{32}")


class Source(TypedDict):
    """Files that a run used.

    Attributes:
        step: an entry of `STEPS`.
        sha256: digest of the weights; of SHA256SUMS for a package.
        run_id: MLflow run that made them, if their folder has a record of it; empty if not.
    """

    step: str
    sha256: str
    run_id: str


def make_source(step: str, sha256: str, folder: Path | None = None) -> Source:
    """Build the record of a source.

    Args:
        step: an entry of `STEPS`.
        sha256: digest of its files.
        folder: run folder of the source, whose `mlflow.json` contains the id of its run.
    """
    run_id: object = ""
    if folder is not None and (folder / STATE).is_file():
        with suppress(UserError, OSError):
            run_id = read_json(folder / STATE).get("run", "")
    return {"step": step, "sha256": sha256, "run_id": run_id if isinstance(run_id, str) else ""}


def link_sources(client: MlflowClient, run: Run, sources: Sequence[Source]) -> None:
    """Set the tags, the description and the input models of a run from its sources.

    A source without a run on this server has only the tag with its digest. A description that the user wrote is not
    changed.
    """
    runs = {step: _find_runs(client, [s for s in sources if s["step"] == step]) for step in STEPS}
    tags = _inherit_tags([*runs["package"], *runs["model"]])
    for step, source_runs in runs.items():
        sha256_tag, run_tag = f"medim.{step}.sha256", f"medim.{step}.run_id"
        digests = ", ".join(dict.fromkeys(source["sha256"] for source in sources if source["step"] == step))
        if digests and step != "evaluation" and tags.get(sha256_tag) != digests:
            tags[sha256_tag] = digests
            tags.pop(run_tag, None)
        if source_runs and run_tag not in tags:
            tags[run_tag] = ", ".join(source_run.info.run_id for source_run in source_runs)
    set_tags(client, run.info.run_id, tags)
    note = run.data.tags.get(NOTE_TAG, "")
    if not note or note.startswith(NOTE_TITLE):
        set_tags(client, run.info.run_id, {NOTE_TAG: format_note(format_lineage(client, tags))})
    _link_models(client, run, runs["model"] or runs["encoder"])


def _inherit_tags(source_runs: Iterable[Run]) -> dict[str, str]:
    """Collect the tags of the steps before the sources."""
    names = [f"medim.{step}.{part}" for step in ("encoder", "model") for part in ("sha256", "run_id")]
    return {name: r.data.tags[name] for r in source_runs for name in names if name in r.data.tags}


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set the tags of a run in one request."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])


def log_weights(client: MlflowClient, run: Run, step: str, sha256: str) -> None:
    """Set the digest of the weights that a run made, and create their logged model, whose source is the run."""
    from mlflow.entities import LoggedModelOutput

    if run.data.tags.get(WEIGHTS_TAG) == sha256 and MODEL_ID_TAG in run.data.tags:
        return
    set_tags(client, run.info.run_id, {WEIGHTS_TAG: sha256})
    model = client.create_logged_model(
        run.info.experiment_id,
        name=step,
        source_run_id=run.info.run_id,
        tags={WEIGHTS_TAG: sha256},
        params={name: value for name, value in run.data.params.items() if name in {"name", "modality", "task", "seed"}},
        model_type=step,
    )
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    set_tags(client, run.info.run_id, {MODEL_ID_TAG: model.model_id})


def _find_runs(client: MlflowClient, sources: Iterable[Source]) -> list[Run]:
    """Find the runs of the sources of one step: by id, or the newest one by digest."""
    runs: dict[str, Run] = {}
    for source in sources:
        for found_run in _find_by_id(client, source) or _find_by_digest(client, source):
            runs[found_run.info.run_id] = found_run
    return list(runs.values())


def _find_by_id(client: MlflowClient, source: Source) -> list[Run]:
    """Find a run by its id; none if this server does not have it, or it made other weights."""
    from mlflow.exceptions import MlflowException

    if not _RUN_ID.fullmatch(source["run_id"]):
        return []
    try:
        found_run = client.get_run(source["run_id"])
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    return [found_run] if found_run.data.tags.get(STEPS[source["step"]][2]) == source["sha256"] else []


def _find_by_digest(client: MlflowClient, source: Source) -> list[Run]:
    """Find the newest run with a digest; all of them for evaluations, at most `MAX_LINKS`."""
    _, experiment_names, tag = STEPS[source["step"]]
    experiments = [client.get_experiment_by_name(name) for name in experiment_names]
    experiment_ids = [experiment.experiment_id for experiment in experiments if experiment is not None]
    if not experiment_ids or not _DIGEST.fullmatch(source["sha256"]):
        return []
    limit = MAX_LINKS if source["step"] == "evaluation" else 1
    condition, order = f"tags.`{tag}` = '{source['sha256']}'", ["attributes.start_time DESC"]
    return list(client.search_runs(experiment_ids, condition, max_results=limit, order_by=order))


def _link_models(client: MlflowClient, run: Run, source_runs: Iterable[Run]) -> None:
    """Set the logged models of the sources as inputs of a run."""
    from mlflow.entities import LoggedModelInput

    previous = {model.model_id for model in run.inputs.model_inputs} if run.inputs else set()
    ids = [model_id for source in source_runs if (model_id := source.data.tags.get(MODEL_ID_TAG))]
    models: list[Any] = [LoggedModelInput(model_id) for model_id in dict.fromkeys(ids) if model_id not in previous]
    if models:
        client.log_inputs(run.info.run_id, models=models)


def format_lineage(client: MlflowClient, tags: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Format a row per source run from the tags of a run: title, link in Markdown, and digest of its files."""
    from mlflow.exceptions import MlflowException

    rows = []
    for step, (title, _, tag) in STEPS.items():
        digests = tags.get(f"medim.{step}.sha256", "").split(", ")
        for run_id in filter(None, tags.get(f"medim.{step}.run_id", "").split(", ")[:MAX_LINKS]):
            with suppress(MlflowException):  # deleted
                found_run = client.get_run(run_id)
                link = f"#/experiments/{found_run.info.experiment_id}/runs/{run_id}"
                digest = found_run.data.tags.get(tag, "")
                rows.append((title, f"[{found_run.info.run_name}]({link})", digest[:12]))
        if f"medim.{step}.run_id" not in tags and digests[0]:
            rows.append((title, "not tracked on this server", digests[0][:12]))
    return rows


def format_note(rows: Sequence[tuple[str, str, str]]) -> str:
    """Format the rows of `format_lineage` as a description in Markdown."""
    lines = [f"| {title} | {link} | `{digest}` |" for title, link, digest in rows]
    return "\n".join([NOTE_TITLE, "", "| step | run | sha256 |", "| --- | --- | --- |", *lines])
