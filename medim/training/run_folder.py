"""Write `config.yaml` and `inputs.json` of a run, and check them before a run is resumed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from medim.config import RunConfig, dump_config, read_yaml_mapping
from medim.files import read_json, write_json, write_text
from medim.models.serialization import locate_weights
from medim.output_folder import SUMMARY_FILE, OutputRecord, output_folder
from medim.renamed_keys import translate_config, translate_preset
from medim.training.engine.checkpoints import find_newest_checkpoint
from medim.training.engine.view_sheet import VIEWS_FILE
from medim.types import UsageError, UserError

log = logging.getLogger(__name__)
REHEARSAL_FOLDER = ".medim-rehearsal"
RUN_FILES = (  # patterns of all files of a run
    *("config.yaml", "inputs.json", "split.csv", "history.csv", "summary.json", "mlflow.json", "mlflow.jsonl"),
    *(
        "checkpoints/*",
        "encoder/*",
        "model/*",
        "cases*.parquet",
        "figures/*",
        "report.html",
        f"{REHEARSAL_FOLDER}/*",
    ),
)
RUN_START_FILES = (  # files before the first step
    *("config.yaml", "inputs.json", "split.csv", "mlflow.json", "mlflow.jsonl", VIEWS_FILE.as_posix()),
    f"{REHEARSAL_FOLDER}/*",
)
ConfigT = TypeVar("ConfigT", bound=RunConfig)


def open_run_folder(
    out: Path, command: str, *, overwrite: bool, resume: bool, inputs: Iterable[Path]
) -> AbstractContextManager[Path]:
    """Lock the folder of a run and provide the folder to train in, see `medim.output_folder.output_folder`."""
    return output_folder(
        out,
        command,
        overwrite=overwrite,
        resume=resume,
        inputs=inputs,
        direct_files=RUN_FILES,
        start_files=RUN_START_FILES,
    )


@contextmanager
def open_rehearsal_folder(out: Path) -> Iterator[Path]:
    """Provide an empty folder in that of a run for files that are written before the first step, and remove it.

    Raises:
        OSError: the folder cannot be created or removed, as without file handles.
    """
    folder = out / REHEARSAL_FOLDER
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process
    try:
        folder.mkdir()
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder)


@contextmanager
def log_failure(result: str, remedy: str) -> Iterator[None]:
    """Log an error of any kind instead of raising it, so that a finished training is not lost with a later step.

    Args:
        result: name of the missing result, for the message.
        remedy: sentence at the end of the message.
    """
    try:
        yield
    except Exception as error:
        log.warning("%s: not written (%s: %s). %s", result, type(error).__name__, error, remedy)
        log.debug("traceback", exc_info=True)


def read_finished_summary(out: Path, record: OutputRecord | None) -> dict[str, Any] | None:
    """Read `summary.json` of a run that `--resume` need not continue.

    Args:
        out: folder of the run.
        record: record of the folder before this command; see `medim.output_folder.read_record`.

    Returns:
        Content of `summary.json`; None if the run is not complete, or lacks a file or has a damaged one.
    """
    if record is None or record.state != "complete" or not all((out / file).is_file() for file in record.files):
        return None
    try:
        summary = read_json(out / SUMMARY_FILE)
        locate_weights(out)
    except UserError:
        return None
    if find_newest_checkpoint(out / "checkpoints")[1] != summary.get("steps"):
        return None
    log.info("%s: already finished, with %d steps; nothing is left to do", out, summary["steps"])
    return summary


def write_config(out: Path, config: RunConfig, **inputs: str | float | None) -> None:
    """Write `config.yaml` and `inputs.json`, or check that the resumed run had the same.

    Args:
        out: folder of the run.
        config: resolved configuration.
        **inputs: other inputs that determine the result: seeds, condition and hash of the index, label budget,
            hash of the encoder.

    Raises:
        UserError: the folder contains a run with another configuration or other inputs.
    """
    path, text = out / "config.yaml", dump_config(config)
    if path.is_file() and path.read_bytes() != text.encode() and not _is_same_config(path, config):
        raise UserError(
            f"{path}: --resume needs the same configuration, but it differs. Use --overwrite to start over."
        )
    file, content = out / "inputs.json", {"schema_version": 1, **inputs}
    if file.is_file():
        recorded = read_json(file)
        if "schema_version" not in recorded:
            raise UserError(f"{file}: expected the inputs of the run, got no schema_version. Use --overwrite.")
        recorded.setdefault("where", inputs.get("where"))  # of earlier versions, whose index_hash decides alone
        differences = [
            f"{key} {previous} (now {content.get(key)})"
            for key, previous in recorded.items()
            if previous != content.get(key)
        ]
        differences += [f"no {key} (now {value})" for key, value in content.items() if key not in recorded and value]
        if differences:
            raise UserError(
                f"{file}: --resume needs the same inputs; the run had {', '.join(differences)}. "
                "Use --overwrite to start over."
            )
    write_text(path, text)
    write_json(file, content)


def read_run_config(path: Path, config_class: type[ConfigT]) -> ConfigT | None:
    """Read `config.yaml` of a run of this or an earlier version; None if it is not a valid configuration.

    Old names are translated without warnings. Keys that were added after the file was written have their default
    values.
    """
    try:
        config = config_class.model_validate(translate_config(read_yaml_mapping(path), warn=False))
    except (ValueError, UsageError):
        return None
    return config.model_copy(update={"name": translate_preset(config.name, warn=False)})


def _is_same_config(path: Path, config: RunConfig) -> bool:
    """Whether a file contains the same configuration, except for data-loading options, which do not affect results."""
    loading = {"workers": config.workers, "prefetch": config.prefetch}
    previous = read_run_config(path, type(config))
    return previous is not None and previous.model_copy(update=loading) == config
