"""Does a package work on a machine without any network? Run by a child process that has none: `python -m`."""

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
from medim.predict.predict import embed_images, predict
from medim.tasks import ENCODER

ISOLATION_COMMANDS = (("unshare", "--net"), ("unshare", "--map-root-user", "--net"))  # as root, as anybody
TIMEOUT_SECONDS = 900


def network_isolation_command() -> tuple[str, ...] | None:
    """The words before a command that take the network from it; None where this machine does not allow it."""
    if shutil.which(ISOLATION_COMMANDS[0][0]):
        for command in ISOLATION_COMMANDS:
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
    return None


def offline_error(folder: Path, isolation: tuple[str, ...]) -> str | None:
    """Verify a package and answer for its phantom in a child without network; what went wrong, None where nothing."""
    command = [*isolation, sys.executable, "-m", "medim.export.offline", str(folder)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer after {TIMEOUT_SECONDS} s"
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
    """Check the package that the command line names."""
    folder = Path(sys.argv[1])
    verify_package(folder)
    with tempfile.TemporaryDirectory() as out:
        _answer_phantom(load_package(folder), Path(out))
    if "torch" in sys.modules:
        raise SystemExit("it loaded torch")


if __name__ == "__main__":
    main()
