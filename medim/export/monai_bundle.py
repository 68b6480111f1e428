"""The package as a MONAI bundle: `configs/` and `models/model.pt`, for those who have MONAI. medim itself reads none.

A 3D U-Net segmenter is a `monai.networks.nets.DynUNet` under other names, and most steps have a transform of MONAI's:
such a bundle runs without medim. What MONAI has no class for is medim's own, and medim must be installed beside MONAI.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from medim.export.builder import Draft
from medim.export.monai_native import Section, as_dynunet, dynunet, is_native, native_steps
from medim.export.sbom import installed
from medim.files import json_bytes
from medim.models.model import build_encoder, build_model
from medim.package.contract import NOT_REPORTED, Contract, Signature
from medim.types import UserError

CHECKPOINT = "models/model.pt"
METADATA, INFERENCE, LOGGING = (f"configs/{name}" for name in ("metadata.json", "inference.json", "logging.conf"))
SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"
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


def network(spec: Section) -> nn.Module:
    """Network of a spec (see `medim.models.serialization`), (N, C, ...) to one tensor; of an encoder its summary."""
    return _Summary(build_encoder(spec)) if spec["kind"] == "encoder" else build_model(spec)


class _Summary(nn.Module):
    """An encoder that answers with its summary alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        summary: torch.Tensor = self.encoder(image).summary
        return summary


def checkpoint(draft: Draft) -> bytes:
    """`models/model.pt`: {"model": tensors} for the network of `configs/inference.json`; no object but tensors."""
    contract = draft.contract
    source: Any = draft.run.graphs[0].source
    built = _Summary(source) if contract.kind == "encoder" else source
    if is_native(contract):
        built = as_dynunet(source, contract)
    buffer = io.BytesIO()
    torch.save({"model": {key: value.clone() for key, value in built.state_dict().items()}}, buffer)
    return buffer.getvalue()


def metadata(draft: Draft) -> bytes:
    """`configs/metadata.json`, by MONAI's schema."""
    contract = draft.contract
    (image,), answer = contract.signature.inputs, contract.signature.outputs[0]
    packages = ["nibabel", "pytorch-ignite", "fire", *([] if is_native(contract) else ["medim"])]
    names = ("background", *contract.classes) if contract.kind == "segmenter" else contract.classes
    common: Section = {"type": "image", "modality": contract.modality, "dtype": "float32", "value_range": []}
    common["is_patch_data"] = contract.inference["mode"] == "sliding"
    content = {
        "schema": SCHEMA,
        "version": contract.version,
        "changelog": {contract.version: "exported by medim"},
        "monai_version": installed("monai"),
        "pytorch_version": installed("torch"),
        "numpy_version": installed("numpy"),
        "required_packages_version": {name: found for name in packages if (found := installed(name))},
        "name": contract.name,
        "task": f"{contract.kind}, {contract.modality}",
        "description": f"{contract.not_for} See MODEL_CARD.md; `medim predict` is the reference.",
        "authors": NOT_REPORTED,
        "copyright": "see LICENSE",
        "intended_use": contract.intended_use,
        "network_data_format": {
            "inputs": {
                "image": {
                    **common,
                    "format": "magnitude",
                    "num_channels": contract.in_channels,
                    "spatial_shape": [_side(side, contract.signature) for side in image.shape[2:]],
                    "channel_def": {str(i): "image" for i in range(contract.in_channels)},
                }
            },
            "outputs": {
                "pred": {
                    **common,
                    "format": _FORMATS[contract.kind],
                    "num_channels": answer.shape[1],
                    "spatial_shape": [_side(side, contract.signature) for side in answer.shape[2:]],
                    "channel_def": {str(i): name for i, name in enumerate(names)},
                }
            },
        },
    }
    return json_bytes(content)


_FORMATS = {
    "segmenter": "segmentation",
    "classifier": "classes",
    "multi_label_classifier": "classes",
    "encoder": "features",
}


def _side(side: int | str, signature: Signature) -> int | str:
    """A side as MONAI writes one: a number, or what is multiplied by n."""
    if isinstance(side, int):
        return side
    symbol = signature.symbols[side]
    least = -(-symbol.minimum // symbol.multiple_of) * symbol.multiple_of
    return f"{least}*n"


def inference(draft: Draft) -> bytes:
    """`configs/inference.json`: a workflow for `python -m monai.bundle run`.

    Its only expressions list the images and start the run: the format has no other way to say these two.
    """
    contract = draft.contract
    content = {
        "imports": [],
        "bundle_root": ".",
        "images": "images/*",
        "output_dir": "predictions",
        "device": "cpu",
        "paths": {"_target_": "glob.glob", "pathname": "@images"},
        "datalist": "$[{'image': path} for path in sorted(@paths)]",
        "network_def": _network_def(draft),
        "network": "@network_def",
        "preprocessing": {"_target_": "Compose", "transforms": _before(contract)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": _inferer(contract),
        "postprocessing": {"_target_": "Compose", "transforms": _after(contract)},
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
    return json_bytes(content)


def logging(draft: Draft) -> bytes:
    """`configs/logging.conf`, the same in every package."""
    return LOGGING_CONF


def _network_def(draft: Draft) -> Section:
    contract = draft.contract
    source: Any = draft.run.graphs[0].source
    if is_native(contract):
        return {"_target_": "DynUNet", **dynunet(contract, source.encoder.channels)}
    kept = ("kind", "encoder", "decoder", "head", "in_channels", "out_channels", "spatial_dims", "input_shape")
    spec = {key: contract.architecture[key] for key in kept if key in contract.architecture}
    if code := [text for text in _texts(spec) if text.startswith(("$", "@", "%"))]:
        raise UserError(
            f"{draft.run.weights.parent}: expected plain words in its spec, got {code}, which MONAI would run."
        )
    return {"_target_": "medim.export.monai_bundle.network", "spec": spec}


def _texts(content: Any) -> list[str]:
    if isinstance(content, dict):
        return [text for pair in content.items() for part in pair for text in _texts(part)]
    if isinstance(content, list | tuple):
        return [text for part in content for text in _texts(part)]
    return [content] if isinstance(content, str) else []


def _before(contract: Contract) -> list[Section]:
    load: Section = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
    steps: list[Section] | None = native_steps(contract.preprocess) if is_native(contract) else None
    if steps is None:
        load["reader"] = "medim.data.loading.monai_reader.MedimReader"
        multiple = contract.inference.get("multiple_of", 1)
        ours = [*contract.preprocess, *([{"op": "pad_to_multiple", "multiple": multiple}] if multiple > 1 else [])]
        steps = [
            {
                "_target_": "Lambdad",
                "keys": "image",
                "func": {"_target_": "medim.data.loading.augmentations.as_monai", "steps": ours},
            }
        ]
    copied = [{"_target_": "CopyItemsd", "keys": "image", "names": "source"}] if contract.kind == "segmenter" else []
    return [load, *copied, *steps]


def _inferer(contract: Contract) -> Section:
    options = contract.inference
    if options["mode"] == "whole":
        return {"_target_": "SimpleInferer"}
    windows = {"roi_size": list(options["roi"]), "overlap": options.get("overlap", 0.5), "mode": "gaussian"}
    return {"_target_": "SlidingWindowInferer", **windows, "padding_mode": "replicate", "sw_batch_size": 1}


def _after(contract: Contract) -> list[Section]:
    if contract.kind == "segmenter":
        return [
            {"_target_": "ResampleToMatchd", "keys": "pred", "key_dst": "source", "mode": "bilinear"},
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {
                "_target_": "SaveImaged",
                "keys": "pred",
                "output_dir": "@output_dir",
                "output_postfix": "seg",
                "output_dtype": {"_target_": "numpy.dtype", "dtype": "uint8"},
                "resample": False,
                "separate_folder": False,
            },
        ]
    activation = contract.postprocess.activation
    decided = [{"_target_": "Activationsd", "keys": "pred", activation: True}] if activation != "none" else []
    told: Section = {"_target_": "FromMetaTensord", "keys": "image", "data_type": "tensor"}  # the file's name
    save: Section = {"_target_": "SaveClassificationd", "keys": "pred", "meta_keys": "image_meta_dict"}
    return [*decided, told, {**save, "output_dir": "@output_dir"}]
