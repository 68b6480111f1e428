"""`config.yaml` and `inputs.json` of a run, and the checks before a run is resumed."""

from __future__ import annotations

from pathlib import Path

import yaml

from medim.config import RunConfig, dump_config
from medim.files import read_json, write_json, write_text
from medim.types import UserError


def write_config(out: Path, config: RunConfig, **inputs: str | float | None) -> None:
    """Write `config.yaml` and `inputs.json`, or check that the run that is taken up had the same.

    Args:
        out: the run's folder.
        config: the resolved configuration.
        **inputs: what else decides the result: seeds, the index's hash, the label budget, the encoder's hash.

    Raises:
        UserError: the folder holds a run of another configuration or other inputs.
    """
    path, text = out / "config.yaml", dump_config(config)
    if path.is_file() and path.read_text() != text and not _is_same_config(path, config):
        raise UserError(
            f"{path}: --resume expected the same configuration, got another. Use --overwrite to start over."
        )
    file, content = out / "inputs.json", {"schema_version": 1, **inputs}
    if file.is_file():
        differences = [
            f"{key} {previous} (now {content.get(key)})"
            for key, previous in read_json(file).items()
            if previous != content.get(key)
        ]
        if differences:
            raise UserError(
                f"{file}: --resume expected the same inputs, got others; the run had {', '.join(differences)}. "
                "Use --overwrite to start over."
            )
    write_text(path, text)
    write_json(file, content)


def _is_same_config(path: Path, config: RunConfig) -> bool:
    """Whether a file says the same as a configuration, but for how images are loaded, which changes no byte.

    Keys that came later than the file have their defaults.
    """
    loading = {"workers": config.workers, "prefetch": config.prefetch}
    try:
        return type(config).model_validate(yaml.safe_load(path.read_text())).model_copy(update=loading) == config
    except (ValueError, yaml.YAMLError):
        return False
