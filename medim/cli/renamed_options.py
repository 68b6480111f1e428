"""Option names of earlier versions, accepted with a warning for one release."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

RENAMED_OPTIONS: dict[str, dict[str, str]] = {  # command: old option -> new option
    "index": {"--reread": "--no-cache"},
    "plan": {"--accelerator": "--device"},
    "pretrain": {"--accelerator": "--device"},
    "finetune": {"--strict": "--fail-on-contamination", "--accelerator": "--device"},
    "evaluate": {"--strict": "--fail-on-contamination", "--include-seen": "--include-training-subjects"},
    "probe": {
        "--map": "--levels",
        "--anchors": "--baselines",
        "--no-anchors": "--no-baselines",
        "--strict": "--fail-on-contamination",
    },
    "study": {
        "--probe": "--frozen",
        "--learning-rates": "--lr-multipliers",
        "--strict": "--fail-on-contamination",
        "--accelerator": "--device",
    },
    "export": {"--sign": "--private-key", "--labels-schema": "--label-codes", "--dicom-in": "--dicom-rules"},
    "verify": {"--trust": "--public-key"},
    "predict": {"--trust": "--public-key", "--as": "--format"},
    "embed": {"--trust": "--public-key", "--map": "--mi-map-dir"},
}


def translate_options(words: Sequence[str], new_names: Mapping[str, str]) -> list[str]:
    """Replace old option names by the new ones and print a warning for each to standard error.

    Args:
        words: the command line after the command's name.
        new_names: old option to new option of this command.

    Examples:
        >>> translate_options(["PACKAGE", "--trust=key.pem"], {"--trust": "--public-key"})
        ['PACKAGE', '--public-key=key.pem']
    """
    translated = []
    options_end = False
    for word in words:
        options_end = options_end or word == "--"
        name, equals, value = word.partition("=")
        new_name = None if options_end else new_names.get(name)
        if new_name is None:
            translated.append(word)
            continue
        print(f"medim: {name} is now {new_name}; the old name will be removed in the next release.", file=sys.stderr)
        translated.append(f"{new_name}{equals}{value}")
    return translated
