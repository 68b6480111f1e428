"""Trained networks on disk: safetensors beside a JSON that says how to build and feed them. Nothing is ever unpickled.

`RUN/encoder/` holds `encoder.safetensors` and `encoder.json`; `RUN/model/` holds `model.safetensors` and
`model.json`. The JSON is the *spec*: `kind` (encoder, segmenter, classifier), `encoder`, `decoder`, `head` (sections
of the tables), `in_channels`, `out_channels`, `spatial_dims`, `input_shape`, `preprocessing`, `inference`, `classes`,
`modality`, `provenance`, `file_sha256`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from medim.files import file_sha256, read_json, write_bytes, write_json
from medim.models.model import Model, build_encoder, build_model
from medim.types import UserError

SCHEMA_VERSION = 1


def save_model(folder: Path, name: str, module: nn.Module, spec: dict[str, Any]) -> None:
    """Write `name.safetensors` and, after it, `name.json`.

    The weights carry no metadata, so that the same weights are the same bytes.

    Args:
        folder: where to write.
        name: `encoder`, `decoder`, `critic` or `model`.
        module: whose weights.
        spec: how to build and feed it (see the module's docstring).
    """
    weights = folder / f"{name}.safetensors"
    write_bytes(
        weights, safetensors.torch.save({key: value.contiguous() for key, value in module.state_dict().items()})
    )
    write_json(folder / f"{name}.json", {"schema_version": SCHEMA_VERSION, **spec, "sha256": file_sha256(weights)})


def locate_weights(path: Path) -> tuple[Path, dict[str, Any]]:
    """Weights and spec of a run, a run's `encoder/` or `model/` folder, or a package.

    Raises:
        UserError: nothing of the kind lies there, or the weights do not match the hash beside them.
    """
    for folder in (path, path / "model", path / "encoder"):
        for name in ("model", "encoder"):
            if (folder / f"{name}.json").is_file():
                weights, spec = folder / f"{name}.safetensors", read_json(folder / f"{name}.json")
                return verify_sha256(weights, spec["sha256"]), spec
    if (path / "medim.json").is_file():
        spec = read_json(path / "medim.json")["architecture"]
        return verify_sha256(path / "models" / "model.safetensors", spec["sha256"]), spec
    raise UserError(f"{path}: expected a finished run (RUN/encoder or RUN/model) or a package, found neither.")


def load_weights(module: nn.Module, weights: Path, *, prefix: str = "") -> None:
    """Load safetensors into a module, key by key.

    Args:
        module: to load into.
        weights: the file.
        prefix: take only the keys that start so, without it.

    Raises:
        UserError: the file is damaged, or its keys or shapes are not the module's.
    """
    try:
        tensors = safetensors.torch.load_file(weights)
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except SafetensorError as error:
        raise UserError(f"{weights}: expected a safetensors file ({error}). Copy it again.") from error
    except RuntimeError as error:
        raise UserError(f"{weights}: the weights do not fit this network: {error}") from error


def load_model(path: Path) -> tuple[Model, dict[str, Any]]:
    """The fine-tuned model of a run or a package, in evaluation mode, and its spec.

    Raises:
        UserError: see `locate_weights`; or there is an encoder alone.
    """
    weights, spec = locate_weights(Path(path))
    if spec["kind"] == "encoder":
        raise UserError(
            f"{path}: expected a fine-tuned model, got an encoder alone. Run `medim finetune --encoder {path}` first."
        )
    model = build_model(spec)
    load_weights(model, weights)
    return model.eval(), spec


def load_encoder(path: str | Path) -> nn.Module:
    """Load a pretrained or fine-tuned encoder for use in plain PyTorch.

    Args:
        path: a run, its `encoder/` folder, or a package.

    Returns:
        An `nn.Module` in evaluation mode with `channels`, `strides`, `summary_channels` and `spec`; calling it with
        (N, in_channels, ...) gives `Features(maps, summary)`. Feed it what `medim.preprocess(volume,
        encoder.spec["preprocessing"])` returns.

    Raises:
        UserError: nothing usable lies at `path`, or it is damaged.
    """
    weights, spec = locate_weights(Path(path))
    encoder: Any
    if spec["kind"] == "encoder":
        encoder = build_encoder(spec)
        load_weights(encoder, weights)
    else:
        encoder = load_model(Path(path))[0].encoder
    encoder.spec = spec
    return encoder.eval()


def verify_sha256(weights: Path, expected: str) -> Path:
    """The file itself, where its bytes are those whose sha256 was recorded.

    Raises:
        UserError: it is missing, changed or damaged.
    """
    if not weights.is_file():
        raise UserError(f"{weights}: the weights are missing; copy the folder again.")
    if file_sha256(weights) != expected:
        raise UserError(
            f"{weights}: its sha256 is not the one recorded beside it; the file was changed or damaged. Copy it again."
        )
    return weights
