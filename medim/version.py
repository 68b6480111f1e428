"""Version of medim and of the libraries that affect results."""

from __future__ import annotations

__version__ = "0.1.0"
DISTRIBUTION = "medim-infomax"  # name on the package index; the name `medim` belongs to another project there


def collect_versions() -> dict[str, str]:
    """Return the versions of medim, Python, torch and Lightning, to record the provenance of a result."""
    import platform  # here, because each command imports this module before it handles signals
    from importlib import metadata

    return {
        "medim": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "lightning": metadata.version("lightning"),
    }


def install_command(extra: str = "") -> str:
    """Shell command that installs medim from a clone, such as `pip install ".[train]"`.

    The distribution is not on the package index yet, so the command names the clone.

    Args:
        extra: name of an extra, such as `train`; empty for the light runtime.

    Examples:
        >>> install_command("train")
        'pip install ".[train]" (in a clone of medim)'
    """
    target = f'".[{extra}]"' if extra else "."
    return f"pip install {target} (in a clone of medim)"
