"""Write `RUN/encoder/`: weights, specs and a card of a pretrained encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medim.config import Section
from medim.data.preprocessing.steps import fixed_spacing
from medim.files import write_text
from medim.model_spec import FeatureLayout, ModelSpec
from medim.models.layers import convert_to_mm
from medim.models.serialization import save_model
from medim.training.pretrain.module import PretrainModule


def write_encoder(folder: Path, module: PretrainModule, spec: ModelSpec, sections: Sequence[Section]) -> None:
    """Write encoder, decoder and the first critic with a score map, each with its spec, and a card.

    Args:
        folder: `RUN/encoder`.
        module: module with the weights.
        spec: spec of the encoder, without the values that its layers determine.
        sections: objectives of the configuration, in the order of the module.
    """
    encoder: Any = module.encoder
    receptive_fields = [encoder.receptive_field(level) for level in range(len(encoder.channels))]
    layout = FeatureLayout(
        channels=list(encoder.channels),
        strides=list(encoder.strides),
        summary_channels=encoder.summary_channels,
        receptive_field_voxels=receptive_fields,
        receptive_field_mm=convert_to_mm(receptive_fields, fixed_spacing(spec.preprocessing)),
    )
    save_model(folder, "encoder", encoder, replace(spec, layout=layout))
    if module.decoder is not None:
        save_model(folder, "decoder", module.decoder, {"kind": "decoder", "decoder": spec.decoder})
    for section, objective in zip(sections, module.objectives.values(), strict=True):
        if hasattr(objective, "score_map"):
            options = {key: value for key, value in section.items() if key != "weight"}
            save_model(folder, "critic", objective, {"kind": "critic", "objective": options})
            break
    write_text(folder / "card.md", _format_encoder_card(spec))


def _format_encoder_card(spec: ModelSpec) -> str:
    provenance, selection = spec.provenance, spec.checkpoint_selection or {}
    labels = f" ({selection['n_labels']} labels)" if selection["n_labels"] else ""
    return (
        f"# Encoder {spec.preset}-{provenance.config_hash}\n\n"
        f"Pretrained by medim {provenance.versions['medim']} without labels on {spec.modality} images "
        f"(index {str(provenance.index_hash)[:12]}, seed {provenance.seed}).\n"
        f"Input: {spec.spatial_dims}D, {spec.in_channels} channel(s), views of {list(spec.input_shape)} voxels "
        "after the steps in `encoder.json`.\n"
        f"The weights are those of step {selection['step']} of {selection['last_step']}: {selection['reason']}"
        f"{labels}.\n\n"
        "Research use only; not for diagnosis. Data sources, population, consent: not reported.\n"
    )
