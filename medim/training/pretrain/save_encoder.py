"""`RUN/encoder/`: the weights that a pretraining run leaves, what they are, and a card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medim.config import Section
from medim.data.preprocessing.steps import fixed_spacing
from medim.files import write_text
from medim.models.layers import in_mm
from medim.models.serialization import save
from medim.training.pretrain.module import PretrainModule


def write_encoder(folder: Path, module: PretrainModule, spec: dict[str, Any], sections: Sequence[Section]) -> None:
    """Write what a run trained: encoder, decoder and the first critic that can draw a map, each with its spec; a card.

    Args:
        folder: `RUN/encoder`.
        module: whose weights.
        spec: of the encoder, without what its layers tell.
        sections: the configuration's objectives, in the module's order.
    """
    encoder: Any = module.encoder
    fields = [encoder.receptive_field(level) for level in range(len(encoder.channels))]
    shapes = {
        "channels": list(encoder.channels),
        "strides": list(encoder.strides),
        "summary_channels": encoder.summary_channels,
        "receptive_field_voxels": fields,
        "receptive_field_mm": in_mm(fields, fixed_spacing(spec["preprocessing"])),
    }
    save(folder, "encoder", encoder, {**spec, **shapes})
    if module.decoder is not None:
        save(folder, "decoder", module.decoder, {"kind": "decoder", "decoder": spec["decoder"]})
    for section, objective in zip(sections, module.objectives.values(), strict=True):
        if hasattr(objective, "score_map"):
            options = {key: value for key, value in section.items() if key != "weight"}
            save(folder, "critic", objective, {"kind": "critic", "objective": options})
            break
    write_text(folder / "card.md", _card(spec))


def _card(spec: dict[str, Any]) -> str:
    made, chosen = spec["provenance"], spec["selected"]
    labels = f" ({chosen['labels']} labels)" if chosen["labels"] else ""
    return (
        f"# Encoder {spec['preset']}-{made['config_hash']}\n\n"
        f"Pretrained by medim {made['medim']} without labels on {spec['modality']} images "
        f"(index {made['index_hash'][:12]}, seed {made['seed']}).\n"
        f"Input: {spec['spatial_dims']}D, {spec['in_channels']} channel(s), views of {spec['input_shape']} voxels "
        "after the steps in `encoder.json`.\n"
        f"The weights are those of step {chosen['step']} of {chosen['of_steps']}: {chosen['why']}{labels}.\n\n"
        "Research use only; not for diagnosis. Data sources, population, consent: not reported.\n"
    )
