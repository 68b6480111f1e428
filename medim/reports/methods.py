"""Sentences for the methods section of a paper, from the configuration and the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medim.reports.page import MODALITY_TEXTS, format_value, pluralise
from medim.types import Step

STEP_TEXTS = {
    "orthogonalise_affine": "image axes were made orthogonal",
    "ras": "axes were reoriented to right, anterior and superior",
    "resample": "images were resampled to {spacing} mm",
    "resize": "images were resized to {shape} pixels",
    "clip_percentiles": "intensities were clipped to the percentiles {lower} and {upper}",
    "normalise": "intensities were normalised ({method})",
    "crop_foreground": "images were cropped to the foreground",
    "pad_or_crop": "images were padded or cropped to {shape} voxels",
    "centre": "a block of {shape} voxels around the centre was extracted",
    "pad_to_multiple": "images were padded to a multiple of {multiple} voxels",
}
OPTIMISER_TEXTS = {"adamw": "AdamW", "adam": "Adam", "sgd": "stochastic gradient descent"}
OBJECTIVE_TEXTS = {
    "local_dim": "local Deep InfoMax",
    "global_dim": "global Deep InfoMax",
    "dense_dim": "dense Deep InfoMax",
    "coordinates": "prediction of coordinates",
    "cpc": "contrastive predictive coding",
    "vae": "a variational autoencoder",
    "beta_vae": "a beta variational autoencoder",
    "amdim": "AMDIM",
    "simclr": "SimCLR",
}
METHOD_TEXTS = {"zscore": "mean 0, standard deviation 1", "range": "0 to 1", "symmetric": "-1 to 1"}


def describe_pretraining(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Describe a pretraining run as a paragraph; empty without a complete configuration."""
    if not _is_complete(config):
        return ""
    names = [str(entry["name"]) for entry in config.get("objectives", ())]
    objectives = [OBJECTIVE_TEXTS.get(name, name.replace("_", " ")) for name in names]
    selection = summary.get("checkpoint_selection")
    sentences = [
        f"{describe_network(config, 'The encoder')} It was pretrained without labels on {_name_modality(config)} with "
        f"{join_words(objectives)} as {'objective' if len(objectives) == 1 else 'objectives'}.",
        f"{describe_preprocessing(config)} {_describe_views(config)}",
        describe_schedule(config, "The encoder", steps=summary.get("steps")),
        f"The weights of step {selection['step']} were used ({selection['reason']})." if selection else "",
        describe_software(summary),
    ]
    return " ".join(filter(None, sentences))


def describe_finetuning(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Describe a fine-tuning run as a paragraph; empty without a complete configuration."""
    if not _is_complete(config):
        return ""
    validation = summary.get("val") or {}
    start = "pretrained weights" if summary.get("init") == "pretrained" else "random weights"
    subjects = f" of {pluralise(validation['subjects'], 'subject')}" if validation.get("subjects") else ""
    sentences = [
        f"{describe_network(config, 'The network')} It was trained for {summary.get('task', config.get('task'))} on "
        f"{pluralise(summary.get('n_labelled'), 'labelled image')} ({_name_modality(config)}), starting from {start}.",
        describe_preprocessing(config),
        describe_schedule(config, "The network", steps=summary.get("steps")),
        f"Performance was measured on {pluralise(validation['n'], 'validation image')}{subjects}. Intervals are 95 % "
        "percentile bootstrap intervals over subjects."
        if validation.get("n")
        else "",
        describe_software(summary),
    ]
    return " ".join(filter(None, sentences))


def describe_network(config: Mapping[str, Any], subject: str) -> str:
    """Describe the network in a sentence."""
    return f"{subject} was {format_network(config)}."


def format_network(config: Mapping[str, Any]) -> str:
    """Format encoder, decoder and head as a noun phrase."""
    parts = [f"the {part} {config[part]['name']}" for part in ("encoder", "decoder") if config.get(part)]
    parts += [f"a head for {config['head']['name'].replace('_', ' ')}"] if config.get("head") else []
    return f"a {len(config['views']['shape'])}D network with {join_words(parts)}"


def describe_preprocessing(config: Mapping[str, Any]) -> str:
    """Describe the preprocessing in a sentence."""
    return f"Preprocessing: {format_preprocessing(config)}."


def format_preprocessing(config: Mapping[str, Any]) -> str:
    """Format the preprocessing steps as clauses."""
    return "; ".join(_format_step(step) for step in config["preprocessing"]) or "none"


def describe_schedule(config: Mapping[str, Any], subject: str, *, steps: int | None = None) -> str:
    """Describe the training schedule in a sentence.

    Args:
        config: configuration of the run.
        subject: subject of the sentence, in the singular.
        steps: number of steps of the run, if it differs from the configuration.
    """
    return f"{subject} was trained for {format_schedule(config, steps=steps)}."


def format_schedule(config: Mapping[str, Any], *, steps: int | None = None, rate: str = "peak learning rate") -> str:
    """Format steps, optimiser and the options that differ from the default as a noun phrase."""
    name = str(config["optimiser"])
    drops = f" and drops at steps {format_value(config['lr_milestones'])}" if config["lr_milestones"] else ""
    warmup = f" after a linear warm-up of {pluralise(config['warmup_steps'], 'step')}" if config["warmup_steps"] else ""
    return (
        f"{pluralise(steps or config['max_steps'], 'step')} with batches of "
        f"{pluralise(config['batch_size'], 'image')} using {OPTIMISER_TEXTS.get(name, name)} ({rate} "
        f"{config['lr']:g}, weight decay {config['weight_decay']:g}) and a {config['schedule']} schedule{drops}{warmup}"
        f"{_format_options(config)}"
    )


def describe_software(summary: Mapping[str, Any]) -> str:
    """Describe the versions of the software in a sentence; empty without a record."""
    versions = summary.get("versions") or {}
    names = {"medim": "medim", "torch": "PyTorch", "lightning": "Lightning"}
    texts = [f"{title} {versions[name]}" for name, title in names.items() if name in versions]
    return f"Software: {join_words(texts)}." if texts else ""


def _format_options(config: Mapping[str, Any]) -> str:
    """Format the options of pretrained parts, loss, batches and crops that differ from the default."""
    head = config.get("head") or {}
    weights, gamma = head.get("class_weights"), head.get("focal_gamma")
    weights_text = "weights from the labelled images" if weights == "balanced" else format_value(weights)
    scale, share = config.get("pretrained_lr_scale", 1.0), config["views"].get("foreground_share")
    parts = [
        f"pretrained parts were trained with {scale:g} times the learning rate" if scale != 1 else "",
        "the head was initialised by a linear probe" if config.get("head_init") == "probe" else "",
        "the Dice loss was computed for each image" if head.get("dice") == "image" else "",
        f"the focal loss had gamma {gamma:g}" if gamma else "",
        f"classes were weighted with {weights_text}" if weights else "",
        "each batch had equally many images of each class" if config.get("balanced_batches") else "",
        f"{100 * share:.3g} % of the crops were centred on foreground" if share else "",
    ]
    return "".join(f"; {part}" for part in parts if part)


def _describe_views(config: Mapping[str, Any]) -> str:
    views = config["views"]
    names = list(dict.fromkeys(str(one["op"]).replace("_", " ") for one in views.get("augmentations") or ()))
    augmentations = f" with random augmentation ({join_words(names)})" if names else ""
    count = views.get("count") or 1
    crops = f"{pluralise(count, 'crop')} of {format_value(views['shape'])} voxels"
    return f"Each step used {crops} per image{augmentations}."


def _format_step(step: Step) -> str:
    options = {key: _format_option(value) for key, value in step.items() if key != "op"}
    options["method"] = METHOD_TEXTS.get(options.get("method", ""), options.get("method", ""))
    try:
        return STEP_TEXTS[str(step["op"])].format(**options)
    except KeyError:  # an option with its default value is not in the file
        return str(step["op"]).replace("_", " ")


def _format_option(value: Any) -> str:
    """Format the value of an option; numbers along axes are joined by multiplication signs."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return " × ".join(map(format_value, value)) if is_list else format_value(value)


def _name_modality(config: Mapping[str, Any]) -> str:
    return MODALITY_TEXTS.get(str(config.get("modality")), "images")


def join_words(words: Sequence[str]) -> str:
    """Join words as a list of a sentence.

    Examples:
        >>> join_words(["a", "b", "c"]), join_words(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _is_complete(config: Mapping[str, Any]) -> bool:
    """Whether a configuration has the keys that the sentences need."""
    needed = {"encoder", "views", "preprocessing", "max_steps", "batch_size", "optimiser", "lr", "lr_milestones"}
    return {*needed, "schedule", "warmup_steps", "weight_decay"} <= config.keys()
