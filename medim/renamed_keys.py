"""Configuration keys and preset names of earlier versions, accepted with a warning for one release.

`CONFIG_KEYS`, `CONFIG_VALUES` and `CONFIG_PRESETS` contain all old names. `medim.config` translates every
configuration with them: YAML files, `key=value` overrides, and sections that Python code passes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from medim.types import UsageError

log = logging.getLogger(__name__)

RUN = "run"  # the keys of a configuration itself; other names are `views` and the entries of tables
CONFIG_KEYS: dict[str, dict[str, str]] = {  # section: old key -> new key
    RUN: {
        "drop_at": "lr_milestones",
        "encode_in_chunks_of": "gradient_cache_chunk",
        "measure_at": "eval_steps",
        "select_without_labels": "checkpoint_selection",
    },
    "views": {"same_place": "same_crop"},
    "local_dim": {"level": "feature_level", "standardise": "batch_norm_summary"},
    "global_dim": {"level": "feature_level", "standardise": "batch_norm_summary"},
    "coordinates": {"level": "feature_level", "see_summary": "use_summary"},
    "cpc": {"level": "feature_level", "scaled": "scale_scores"},
    "reconstruction": {"hidden": "mask_ratio", "block": "mask_patch_size"},
    "dense_dim": {"hidden": "mask_ratio", "block": "mask_patch_size", "scaled": "scale_scores"},
    "encode_and_dot": {"scaled": "scale_scores"},
    "bilinear": {"scaled": "scale_scores"},
}
CONFIG_VALUES: dict[str, dict[str, dict[object, object]]] = {  # section: key in the file -> old value -> new value
    RUN: {
        "schedule": {"steps": "multistep"},
        "select_without_labels": {True: "loss", False: "probe"},
    }
}
CONFIG_PRESETS: dict[str, str] = {  # old name -> new name
    f"small-{dims}d-{kind}": f"test-{dims}d-{kind}"
    for dims in (2, 3)
    for kind in (
        *("amdim", "beta-vae", "coordinates", "cpc", "dense-dim", "global-dim", "local-dim", "local-global"),
        *("prior-matching", "reconstruction", "relative-coordinates", "simclr", "vae"),
    )
}


def translate_config(content: Mapping[str, object], *, warn: bool = True) -> dict[str, object]:
    """Replace old keys and values of a configuration, at every level.

    Args:
        content: content of a configuration file.
        warn: whether to log a warning per old name. Files that earlier versions wrote are read without warnings.

    Raises:
        UsageError: a key has its old and its new name.

    Examples:
        >>> translate_config({"views": {"same_place": True}, "schedule": "steps", "drop_at": [5]}, warn=False)
        {'views': {'same_crop': True}, 'schedule': 'multistep', 'lr_milestones': [5]}
    """
    return _translate_mapping(content, RUN, warn=warn)


def translate_section(content: Any, *, section: str = "", warn: bool = True) -> Any:
    """Replace old keys of a section such as `{name: local_dim, level: 1}`, and of the sections in it.

    Args:
        content: a section, a list of sections, or another value, which is returned unchanged.
        section: section in `CONFIG_KEYS`; empty: the `name` in the content.
        warn: see `translate_config`.

    Raises:
        UsageError: a key has its old and its new name.
    """
    if isinstance(content, Mapping):
        return _translate_mapping(content, section or str(content.get("name")), warn=warn)
    if isinstance(content, list | tuple):
        return type(content)(translate_section(item, warn=warn) for item in content)
    return content


def translate_item(section: str, key: str, value: Any, *, warn: bool = True) -> tuple[str, Any]:
    """Replace an old key or an old value of a section; returns key and value.

    Args:
        section: section in `CONFIG_KEYS`.
        key: key in the file or override.
        value: value of the key; sections in it are translated too.
        warn: see `translate_config`.
    """
    new_key = CONFIG_KEYS.get(section, {}).get(key, key)
    new_values = CONFIG_VALUES.get(section, {}).get(key, {})
    is_old_value = isinstance(value, str | bool) and value in new_values
    new_value = new_values[value] if is_old_value else value
    if warn and (new_key != key or is_old_value):
        place = "" if section == RUN else f"{section}."
        _warn_once(
            f"{place}{key}{_format_value(value, is_old_value)}",
            f"{place}{new_key}{_format_value(new_value, is_old_value)}",
        )
    inner_section = "views" if (section, new_key) == (RUN, "views") else ""
    return new_key, translate_section(new_value, section=inner_section, warn=warn)


def translate_preset(name: str, *, warn: bool = True) -> str:
    """Replace the name of a preset of an earlier version; other names are returned unchanged."""
    new_name = CONFIG_PRESETS.get(name, name)
    if warn and new_name != name:
        _warn_once(f"preset {name}", new_name)
    return new_name


def _translate_mapping(content: Mapping[str, object], section: str, *, warn: bool) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in content.items():
        new_key, new_value = translate_item(section, key, value, warn=warn)
        if new_key != key and new_key in content:
            place = "" if section == RUN else f"{section}."
            raise UsageError(f"{place}{key}: this key is now {new_key}, and both are given. Remove {key}.")
        result[new_key] = new_value
    return result


def _format_value(value: Any, is_shown: bool) -> str:
    return f": {str(value).lower() if isinstance(value, bool) else value}" if is_shown else ""


@functools.cache
def _warn_once(old: str, new: str) -> None:
    """Log the warning about a name the first time that this process meets it."""
    log.warning("%s is now %s; the old name will be removed in the next release.", old, new)
