"""MONAI bundle in a package: `configs/` and `models/model.pt`. medim itself does not read these files.

A 3D U-Net segmenter is equivalent to a `monai.networks.nets.DynUNet`, and most preprocessing steps have an equivalent
MONAI transform. Such a bundle runs without medim. Other bundles use classes of medim, which must then be installed in
addition to MONAI.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from medim.data.mask_classes import is_identity
from medim.export.builder import PackageBuilder
from medim.export.monai_native import BundleSection, dynunet_options, is_monai_native, to_dynunet, to_monai_transforms
from medim.export.sbom import find_version
from medim.files import encode_json
from medim.model_spec import NetworkSpec
from medim.models.model import build_encoder, build_model
from medim.package.contract import NOT_REPORTED, Contract, Signature
from medim.tasks import ENCODER, is_dense, map_tasks_by_kind
from medim.types import UserError
from medim.version import DISTRIBUTION

CHECKPOINT = "models/model.pt"
METADATA, INFERENCE, LOGGING = (f"configs/{name}" for name in ("metadata.json", "inference.json", "logging.conf"))
METADATA_SCHEMA = (
    "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
)
LOGGING_CONF = b"""\
[loggers]
keys=root

[handlers]
keys=console

[formatters]
keys=plain

[logger_root]
level=INFO
handlers=console

[handler_console]
class=StreamHandler
level=INFO
formatter=plain
args=(sys.stdout,)

[formatter_plain]
format=%(asctime)s %(name)s %(levelname)s %(message)s
"""


def network(spec: BundleSection) -> nn.Module:
    """Build the network of a spec (see `medim.models.serialization`) with one output tensor.

    The output of an encoder is its summary vector.
    """
    network_spec = NetworkSpec.from_json(spec, "spec of the MONAI bundle")
    return _SummaryEncoder(build_encoder(network_spec)) if spec["kind"] == ENCODER else build_model(network_spec)


class _SummaryEncoder(nn.Module):
    """Encoder with the summary vector as its only output."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        summary: torch.Tensor = self.encoder(image).summary
        return summary


def build_checkpoint(builder: PackageBuilder) -> bytes:
    """Build `models/model.pt`: {"model": tensors} for the network of `configs/inference.json`; it has only tensors."""
    contract = builder.contract
    module: Any = builder.run.graphs[0].module
    answer_module = _SummaryEncoder(module) if contract.kind == ENCODER else module
    if is_monai_native(contract):
        answer_module = to_dynunet(module, contract)
    buffer = io.BytesIO()
    torch.save({"model": {key: value.clone() for key, value in answer_module.state_dict().items()}}, buffer)
    return buffer.getvalue()


def build_metadata(builder: PackageBuilder) -> bytes:
    """Build `configs/metadata.json` in MONAI's schema."""
    contract = builder.contract
    (image,), answer = contract.signature.inputs, contract.signature.outputs[0]
    packages = ["nibabel", "pytorch-ignite", "fire", *([] if is_monai_native(contract) else [DISTRIBUTION])]
    task = map_tasks_by_kind().get(contract.kind)
    names = ("background", *contract.classes) if is_dense(contract.kind) else contract.classes
    common_fields: BundleSection = {
        "type": "image",
        "modality": contract.modality,
        "dtype": "float32",
        "value_range": [],
    }
    common_fields["is_patch_data"] = contract.inference["mode"] == "sliding"
    content = {
        "schema": METADATA_SCHEMA,
        "version": contract.version,
        "changelog": {contract.version: "exported by medim"},
        "monai_version": find_version("monai"),
        "pytorch_version": find_version("torch"),
        "numpy_version": find_version("numpy"),
        "required_packages_version": {
            name: package_version for name in packages if (package_version := find_version(name))
        },
        "name": contract.name,
        "task": f"{contract.kind}, {contract.modality}",
        "description": f"{contract.not_for} See MODEL_CARD.md; `medim predict` is the reference.",
        "authors": NOT_REPORTED,
        "copyright": "see LICENSE",
        "intended_use": contract.intended_use,
        "network_data_format": {
            "inputs": {
                "image": {
                    **common_fields,
                    "format": "magnitude",
                    "num_channels": contract.in_channels,
                    "spatial_shape": [_format_side(side, contract.signature) for side in image.shape[2:]],
                    "channel_def": {str(i): "image" for i in range(contract.in_channels)},
                }
            },
            "outputs": {
                "pred": {
                    **common_fields,
                    "dtype": answer.dtype,
                    "format": "features" if task is None else task.monai_output,
                    "num_channels": answer.shape[1],
                    "spatial_shape": [_format_side(side, contract.signature) for side in answer.shape[2:]],
                    "channel_def": {str(i): name for i, name in enumerate(names)},
                }
            },
        },
    }
    return encode_json(content)


def _format_side(side: int | str, signature: Signature) -> int | str:
    """Format an axis length in MONAI's notation: a number, or `<minimum>*n` for a variable length."""
    if isinstance(side, int):
        return side
    symbol = signature.symbols[side]
    minimum = -(-symbol.minimum // symbol.multiple_of) * symbol.multiple_of
    return f"{minimum}*n"


def build_inference_config(builder: PackageBuilder) -> bytes:
    """Build `configs/inference.json`: a workflow for `python -m monai.bundle run`.

    It contains only two expressions, which list the images and start the run; the format requires both.
    """
    contract = builder.contract
    content = {
        "imports": [],
        "bundle_root": ".",
        "images": "images/*",
        "output_dir": "predictions",
        "device": "cpu",
        "paths": {"_target_": "glob.glob", "pathname": "@images"},
        "datalist": "$[{'image': path} for path in sorted(@paths)]",
        "network_def": _build_network_definition(builder),
        "network": "@network_def",
        "preprocessing": {"_target_": "Compose", "transforms": _build_preprocessing(contract)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": _build_inferer(contract),
        "postprocessing": {"_target_": "Compose", "transforms": _build_postprocessing(contract)},
        "handlers": [{"_target_": "CheckpointLoader", "load_path": CHECKPOINT, "load_dict": {"model": "@network"}}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "run": ["$@evaluator.run()"],
    }
    return encode_json(content)


def build_logging_config(builder: PackageBuilder) -> bytes:
    """Build `configs/logging.conf`, which is identical in all packages."""
    return LOGGING_CONF


def _build_network_definition(builder: PackageBuilder) -> BundleSection:
    contract = builder.contract
    module: Any = builder.run.graphs[0].module
    if is_monai_native(contract):
        return {"_target_": "DynUNet", **dynunet_options(contract, module.encoder.channels)}
    spec_keys = ("kind", "encoder", "decoder", "head", "in_channels", "out_channels", "spatial_dims", "input_shape")
    spec = {key: contract.architecture[key] for key in spec_keys if key in contract.architecture}
    if expressions := [text for text in _collect_texts(spec) if text.startswith(("$", "@", "%"))]:
        raise UserError(
            f"{builder.run.weights.parent}: MONAI would execute {expressions} in the spec of the network. "
            "Remove leading `$`, `@` and `%`."
        )
    return {"_target_": "medim.export.monai_bundle.network", "spec": spec}


def _collect_texts(content: Any) -> list[str]:
    if isinstance(content, dict):
        return [text for pair in content.items() for part in pair for text in _collect_texts(part)]
    if isinstance(content, list | tuple):
        return [text for part in content for text in _collect_texts(part)]
    return [content] if isinstance(content, str) else []


def _build_preprocessing(contract: Contract) -> list[BundleSection]:
    load: BundleSection = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
    steps: list[BundleSection] | None = to_monai_transforms(contract.preprocess) if is_monai_native(contract) else None
    if steps is None:
        load["reader"] = "medim.data.loading.monai_reader.MedimReader"
        multiple = contract.inference.get("multiple_of", 1)
        medim_steps = [
            *contract.preprocess,
            *([{"op": "pad_to_multiple", "multiple": multiple}] if multiple > 1 else []),
        ]
        steps = [
            {
                "_target_": "Lambdad",
                "keys": "image",
                "func": {"_target_": "medim.data.loading.augmentations.as_monai", "steps": medim_steps},
            }
        ]
    copy_source = [{"_target_": "CopyItemsd", "keys": "image", "names": "source"}] if is_dense(contract.kind) else []
    return [load, *copy_source, *steps]


def _build_inferer(contract: Contract) -> BundleSection:
    options = contract.inference
    if options["mode"] == "whole":
        return {"_target_": "SimpleInferer"}
    windows = {"roi_size": list(options["roi"]), "overlap": options.get("overlap", 0.5), "mode": "gaussian"}
    return {"_target_": "SlidingWindowInferer", **windows, "padding_mode": "replicate", "sw_batch_size": 1}


def _build_value_mapping(values: Sequence[int]) -> list[BundleSection]:
    """Build the transform from class numbers to the values of the mask files; none where they are equal."""
    if is_identity(values):
        return []
    numbers = list(range(len(values) + 1))
    return [{"_target_": "MapLabelValued", "keys": "pred", "orig_labels": numbers, "target_labels": [0, *values]}]


def _build_postprocessing(contract: Contract) -> list[BundleSection]:
    if is_dense(contract.kind):
        return [
            {"_target_": "ResampleToMatchd", "keys": "pred", "key_dst": "source", "mode": "bilinear"},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            *_build_value_mapping(contract.spec.class_values),
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_postfix": "seg",
                "output_dtype": {
                    "_target_": "numpy.dtype",
                    "dtype": "uint8" if max(contract.spec.class_values, default=0) < 256 else "uint16",
                },
                "resample": False,
                "separate_folder": False,
            },
        ]
    activation = contract.postprocess.activation
    activations = [{"_target_": "Activationsd", "keys": "pred", activation: True}] if activation != "none" else []
    file_metadata: BundleSection = {
        "_target_": "FromMetaTensord",
        "keys": "image",
        "data_type": "tensor",
    }  # copies the file name
    save: BundleSection = {"_target_": "SaveClassificationd", "keys": "pred", "meta_keys": "image_meta_dict"}
    return [*activations, file_metadata, {**save, "output_dir": "@output_dir"}]
