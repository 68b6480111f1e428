"""Check that a package works without network access; run by `python -m` in an isolated child process."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np

from medim.package.contract import GOLDEN
from medim.package.golden import GoldenInput
from medim.package.package import Package, load_package, verify_package
from medim.predict.embed import embed_images
from medim.predict.predict import predict
from medim.tasks import ENCODER

ISOLATION_COMMANDS = (("unshare", "--net"), ("unshare", "--map-root-user", "--net"))  # as root, as another user
TIMEOUT_SECONDS = 900


def network_isolation_command() -> tuple[str, ...] | None:
    """Find the command prefix that disables network access; None if this machine does not allow it."""
    if shutil.which(ISOLATION_COMMANDS[0][0]):
        for command in ISOLATION_COMMANDS:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
    return None


def offline_error(folder: Path, isolation: tuple[str, ...]) -> str | None:
    """Verify a package and predict its phantom in a child process without network access.

    Returns:
        Error message, or None on success.
    """
    command = [*isolation, sys.executable, "-m", "medim.export.offline", str(folder)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no prediction after {TIMEOUT_SECONDS} s"
    return (
        None if process.returncode == 0 else (process.stderr.strip().splitlines() or [f"exit {process.returncode}"])[-1]
    )


def _answer_phantom(package: Package, out: Path) -> None:
    volume = GoldenInput.parse(package.read_file(GOLDEN)).volume
    if volume.spatial_dims == 3:
        image = out / "phantom.nii.gz"
        channels = np.moveaxis(volume.array, 0, -1) if len(volume.array) > 1 else volume.array[0]
        nibabel.save(nibabel.Nifti1Image(channels, volume.affine), image)  # type: ignore[no-untyped-call]
    else:
        image = out / "phantom.npy"
        np.save(image, volume.array[0] if len(volume.array) == 1 else volume.array)
    if package.contract.kind == ENCODER:
        embed_images(package, [image], out / "features.npz")
    else:
        predict(package, [image], out / "answer")


def main() -> None:
    """Check the package given on the command line."""
    folder = Path(sys.argv[1])
    verify_package(folder)
    with tempfile.TemporaryDirectory() as out:
        _answer_phantom(load_package(folder), Path(out))
    if "torch" in sys.modules:
        raise SystemExit("the package imported torch")


if __name__ == "__main__":
    main()
