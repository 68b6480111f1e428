"""Trained networks on disk: weights as safetensors with a JSON specification. Nothing is unpickled.

`RUN/encoder/` contains `encoder.safetensors` and `encoder.json`; `RUN/model/` contains `model.safetensors` and
`model.json`. The JSON file is the *spec* for building the network and preparing its input: `kind` (encoder, segmenter,
classifier), `encoder`, `decoder`, `head` (sections of the tables), `in_channels`, `out_channels`, `spatial_dims`,
`input_shape`, `preprocessing`, `inference`, `classes`, `modality`, `provenance`, `file_sha256`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from medim.config import Section
from medim.data.preprocessing.steps import check_steps
from medim.files import decode_json, file_sha256, write_bytes, write_json
from medim.integrity import COPY_AGAIN, SUMS, PackageError, read_with_digest, verify_checksums
from medim.model_spec import SCHEMA_VERSION, ModelSpec, read_spec
from medim.models.model import Model, build_encoder, build_model, check_sections
from medim.types import UserError


def save_model(folder: Path, name: str, module: nn.Module, spec: ModelSpec | Section) -> None:
    """Write `name.safetensors` and, after it, `name.json`.

    The weights file has no metadata, so that equal weights give equal bytes. A tensor with several names, such as a
    layer that is registered twice, is written once, under its first name.

    Args:
        folder: output folder.
        name: `encoder`, `decoder`, `critic` or `model`.
        module: module with the weights to save.
        spec: specification of the network and its input (see the module docstring).

    Raises:
        UserError: a weight is NaN or infinite, because the training diverged; nothing is written.
    """
    check_finite_weights(module.state_dict(), f"{folder / name}.safetensors")
    weights = folder / f"{name}.safetensors"
    state, first_names = module.state_dict(), _map_shared_tensors(module)
    tensors = {key: _separate_storage(tensor) for key, tensor in state.items() if key not in first_names}
    write_bytes(weights, safetensors.torch.save(tensors))
    content = spec.to_json() if isinstance(spec, ModelSpec) else {"schema_version": SCHEMA_VERSION, **spec}
    write_json(folder / f"{name}.json", {**content, "sha256": file_sha256(weights)})


def locate_weights(path: Path) -> tuple[Path, ModelSpec]:
    """Locate weights and spec of a run, of its `encoder/` or `model/` folder, or of a package.

    Raises:
        UserError: none of these exists at `path`, or the weights do not match the recorded hash.
        PackageError: a file of the package is modified, missing or not listed in its SHA256SUMS.
    """
    for folder in (path, path / "model", path / "encoder"):
        for name in ("model", "encoder"):
            if (folder / f"{name}.json").is_file():
                spec = read_spec(folder / f"{name}.json")
                _check_network(spec, folder / f"{name}.json")
                return verify_sha256(folder / f"{name}.safetensors", spec.sha256), spec
    contract = path / "medim.json"
    if contract.is_file() or (path / SUMS).is_file():
        manifest = verify_checksums(path)
        if "medim.json" not in manifest.sums:
            raise PackageError(f"{path}: expected the contract medim.json of a package, which is missing. {COPY_AGAIN}")
        content = decode_json(read_with_digest(contract, manifest.sums["medim.json"]), contract)
        architecture = content.get("architecture")
        spec = ModelSpec.from_json(architecture if isinstance(architecture, dict) else {}, contract)
        _check_network(spec, contract)
        return verify_sha256(path / "models" / "model.safetensors", spec.sha256), spec
    raise UserError(
        f"{path}: expected a finished run (RUN/encoder or RUN/model) or a package, found neither. Check the path, or "
        "finish the run with --resume."
    )


def _check_network(spec: ModelSpec, file: Path) -> None:
    """Check that the network of a spec can be built, and its input prepared, with this version.

    Raises:
        UserError: a section or a preprocessing step has an unknown name or option, or a value of the wrong type.
    """
    try:
        check_sections(spec)
        check_steps(spec.preprocessing)
    except UserError as error:
        raise UserError(f"{file}: {error} Copy the file again, or train again with this version.") from error


def load_weights(module: nn.Module, weights: Path, *, prefix: str = "") -> None:
    """Load safetensors into a module, key by key.

    Args:
        module: module to load into.
        weights: weights file.
        prefix: load only the keys with this prefix, and remove it.

    Raises:
        UserError: the file is damaged, its keys or shapes differ from those of the module, or a weight is not finite.
    """
    try:
        tensors = safetensors.torch.load_file(weights)
        check_finite_weights(tensors, weights)
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        shared = {name: state[first] for name, first in _map_shared_tensors(module).items() if first in state}
        module.load_state_dict(shared | state)
    except SafetensorError as error:
        raise UserError(f"{weights}: expected a safetensors file ({error}). Copy it again.") from error
    except RuntimeError as error:
        raise UserError(f"{weights}: the weights do not fit this network: {error}") from error


def _map_shared_tensors(module: nn.Module) -> dict[str, str]:
    """Map the further names of each tensor of a module to its first name."""
    first_names: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    shared = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and first_names.setdefault(key, name) != name:
            shared[name] = first_names[key]
    return shared


def _separate_storage(tensor: torch.Tensor) -> torch.Tensor:
    """Make a tensor contiguous, with a storage of its own if it is a part of another tensor."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def check_finite_weights(tensors: Mapping[str, torch.Tensor], place: Path | str) -> None:
    """Check that all weights are finite.

    Args:
        tensors: weights and running statistics by name.
        place: file or network that they belong to, for the message.

    Raises:
        UserError: a number is NaN or infinite.
    """
    count = sum(
        int(tensor.numel() - torch.isfinite(tensor).sum()) for tensor in tensors.values() if tensor.is_floating_point()
    )
    if count:
        raise UserError(
            f"{place}: {count} weights are NaN or infinite, so the training has diverged. Train again with a lower lr, "
            "with gradient_clip=1 and with warmup_steps."
        )


def load_model(path: Path) -> tuple[Model, ModelSpec]:
    """Load the fine-tuned model of a run or a package, in evaluation mode, and its spec.

    Raises:
        UserError: see `locate_weights`; or there is only an encoder.
    """
    weights, spec = locate_weights(Path(path))
    if spec.is_encoder:
        raise UserError(
            f"{path}: expected a fine-tuned model, got an encoder. Run `medim finetune --encoder {path}` first."
        )
    model = build_model(spec)
    load_weights(model, weights)
    return model.eval(), spec


def load_encoder(path: str | Path) -> nn.Module:
    """Load a pretrained or fine-tuned encoder for use in plain PyTorch.

    Args:
        path: a run, its `encoder/` folder, or a package.

    Returns:
        An `nn.Module` in evaluation mode with `channels`, `strides`, `summary_channels` and `spec`; calling it with (N,
        in_channels, ...) gives `Features(maps, summary)`. Its input is the output of `medim.preprocess(volume,
        encoder.spec.preprocessing)`.

    Raises:
        UserError: there is no run or package at `path`, or it is damaged.

    Examples:
        >>> content = {"kind": "encoder", "modality": "xray", "preprocessing": [], "in_channels": 1, "spatial_dims": 2}
        >>> content |= {"encoder": {"name": "unet", "channels": [4, 8]}, "input_shape": [32, 32]}
        >>> spec = ModelSpec.from_json(content, "encoder.json")
        >>> save_model(Path("encoder"), "encoder", build_encoder(spec), spec)
        >>> load_encoder("encoder").strides
        (1, 2)
    """
    weights, spec = locate_weights(Path(path))
    encoder: Any
    if spec.is_encoder:
        encoder = build_encoder(spec)
        load_weights(encoder, weights)
    else:
        encoder = load_model(Path(path))[0].encoder
    encoder.spec = spec
    return encoder.eval()


def verify_sha256(weights: Path, expected: str) -> Path:
    """Return the path of the weights if their SHA-256 is the expected one.

    Raises:
        UserError: the file is missing, changed or damaged.
    """
    if not weights.is_file():
        raise UserError(f"{weights}: the weights are missing; copy the folder again.")
    if file_sha256(weights) != expected:
        raise UserError(
            f"{weights}: its sha256 differs from the recorded one; the file was changed or damaged. Copy it again."
        )
    return weights
