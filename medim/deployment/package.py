"""A package: one folder that says what it is, runs without torch, and proves that it is whole."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from medim.deployment.contract import (
    GOLDEN,
    GRAPH,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    STATISTICS,
    WEIGHTS,
    Contract,
    PackageError,
    parse,
)
from medim.deployment.golden import Golden
from medim.deployment.guard import Reference
from medim.deployment.inference import Network, Run
from medim.deployment.session import Session, session
from medim.files import sha256, write_text
from medim.types import Array, UserError, Volume

__all__ = ["Check", "Package", "PackageError", "load_package", "session", "verify", "write_sums"]

SUMS = "SHA256SUMS"
COPY_AGAIN = "Copy the package again from where it was exported."


@dataclass(frozen=True)
class Check:
    """One thing that `verify` looked at.

    Attributes:
        name: what.
        verdict: `pass`, or `not run` where something it needs is missing; a failure raises.
        detail: a number or a reason.
    """

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True, eq=False)
class Package:
    """A package whose files were all checked against SHA256SUMS.

    Attributes:
        folder: where it lies.
        contract: the content of `medim.json`.
        sums: sha256 of every file.
    """

    folder: Path
    contract: Contract
    sums: dict[str, str]

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked once more, so that what is used is what was verified."""
        return _read(self.folder / name, self.sums[name])

    @property
    def sha256(self) -> str:
        """The digest of SHA256SUMS, which stands for the whole package."""
        return hashlib.sha256((self.folder / SUMS).read_bytes()).hexdigest()

    @functools.cached_property
    def run(self) -> Session:
        """The network under ONNX Runtime, on the CPU; the first output of the signature for an input inside it."""
        return session(self.read(GRAPH), self.contract.signature)

    @functools.cached_property
    def score_map(self) -> Session | None:
        """The mutual-information map under ONNX Runtime; None where the package holds none."""
        found = self.contract.score_map
        return session(self.read(SCORE_MAP), found.signature, name=SCORE_MAP) if found else None

    @functools.cached_property
    def reference(self) -> Reference | None:
        """What the out-of-distribution guard compares with; None where the package holds none."""
        if self.contract.reference is None:
            return None
        try:
            reference = Reference.parse(self.read(STATISTICS))
            if (found := len(reference.parts["features"].mean)) != self.contract.signature.outputs[-1].shape[1]:
                raise ValueError(f"{found} features")
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise PackageError(f"{self.folder / STATISTICS}: cannot be read ({error}). {COPY_AGAIN}") from error
        return reference

    @functools.cached_property
    def network(self) -> Network:
        """The network with its preprocessing, ready for images as a reader gives them."""
        contract = self.contract
        return Network(
            run=self.run,
            kind=contract.kind,
            modality=contract.modality,
            spatial_dims=contract.spatial_dims,
            in_channels=contract.in_channels,
            classes=contract.classes,
            preprocessing=contract.preprocess,
            inference=contract.inference,
            score_map=self._run_score_map if contract.score_map else None,
            both=self.run.both,
            reference=self.reference,
        )

    def _run_score_map(self, image: Array) -> Array:
        """`score_map`, whose graph is read with the first image that asks for one."""
        assert self.score_map is not None
        return self.score_map(image)

    def __call__(self, volume: Volume) -> Array:
        """Answer for one image; see `Network`."""
        return self.network(volume)


def load_package(path: str | Path) -> Package:
    """Open a package.

    Every file is checked against SHA256SUMS before anything is parsed.

    Args:
        path: the package's folder.

    Raises:
        PackageError: a file was changed, is missing or does not belong; a link; or a contract of another schema.
    """
    folder = Path(path)
    sums = _verified(folder)
    contract = parse(_read(folder / "medim.json", sums["medim.json"]))
    if contract.architecture.get("sha256") != sums[WEIGHTS]:
        raise PackageError(f"{folder / WEIGHTS}: not the weights that medim.json names. {COPY_AGAIN}")
    if contract.reference and STATISTICS not in sums:
        raise PackageError(f"{folder}: expected {STATISTICS} too. {COPY_AGAIN}")
    if contract.score_map and not {SCORE_MAP, SCORE_MAP_GOLDEN} <= sums.keys():
        raise PackageError(f"{folder}: expected {SCORE_MAP} and {SCORE_MAP_GOLDEN} too. {COPY_AGAIN}")
    return Package(folder, contract, sums)


def verify(path: str | Path) -> list[Check]:
    """Check a package's files, contract and network, and run its golden input through it.

    Returns:
        What was checked, in order; a failed check raises.

    Raises:
        PackageError: something is not what the package says.
    """
    package = load_package(path)
    checks = [
        Check("files", "pass", f"{len(package.sums)} files have the sha256 that {SUMS} names"),
        Check("contract", "pass", f"{package.contract.kind} {package.contract.name} {package.contract.version}"),
    ]
    run, score_map = package.run, package.score_map
    checks.append(Check("network", "pass", "inputs and outputs are those of the signature"))
    checks.append(_golden(package, "golden", GOLDEN, run))
    if package.reference is not None:
        checks.append(Check("out-of-distribution guard", "pass", str(package.contract.reference)))
    if score_map is not None:
        checks.append(_golden(package, "score map", SCORE_MAP_GOLDEN, score_map))
    return checks


def _golden(package: Package, name: str, file: str, run: Run) -> Check:
    """Run a golden input and compare with its answer at export."""
    try:
        difference = Golden.parse(package.read(file)).difference(run, package.contract)
    except (UserError, ValueError, KeyError) as error:
        raise PackageError(f"{package.folder}: the golden input cannot be run ({error}). {COPY_AGAIN}") from error
    if not difference.small:
        raise PackageError(
            f"{package.folder}: the golden input gives another answer than at export: {difference}. {COPY_AGAIN}"
        )
    return Check(name, "pass", str(difference))


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every file of a folder; `sha256sum -c SHA256SUMS` reads it too."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in files if name != SUMS]
    write_text(folder / SUMS, "".join(lines))


def _read(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: could not be read ({error.strerror}). {COPY_AGAIN}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise PackageError(f"{path}: the file changed since it was verified. {COPY_AGAIN}")
    return data


def _verified(folder: Path) -> dict[str, str]:
    """The sums of a folder that holds exactly the files its SHA256SUMS names, each as it was."""
    if not (folder / SUMS).is_file():
        raise PackageError(
            f"{folder}: expected a package (a folder with {SUMS} and medim.json), found none. Run `medim export`."
        )
    files = _files(folder)
    sums = _sums(folder)
    missing, extra = sorted(sums.keys() - files), sorted(files - sums.keys())
    if missing or extra:
        raise PackageError(
            f"{folder}: expected exactly the files of {SUMS}; missing: {missing}, not listed: {extra}. {COPY_AGAIN}"
        )
    for name, digest in sums.items():
        if sha256(folder / name) != digest:
            raise PackageError(
                f"{folder / name}: changed or damaged; its sha256 is not the one in {SUMS}. {COPY_AGAIN}"
            )
    needed = {"medim.json", WEIGHTS, GRAPH, GOLDEN}
    if not needed <= files:
        raise PackageError(f"{folder}: expected a package to hold {sorted(needed - files)} too. {COPY_AGAIN}")
    return sums


def _files(folder: Path) -> set[str]:
    """Relative paths of the files below a folder, SHA256SUMS apart; nothing but plain files and folders is allowed."""
    found = set()
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place) / name
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise PackageError(f"{path}: expected plain files in a package, got a link or device. {COPY_AGAIN}")
            if stat.S_ISREG(mode):
                found.add(path.relative_to(folder).as_posix())
    return found - {SUMS}


def _sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS as {path: digest}; a path that leaves the folder is refused."""
    sums: dict[str, str] = {}
    try:
        lines = (folder / SUMS).read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise PackageError(f"{folder / SUMS}: expected text. {COPY_AGAIN}") from None
    for number, line in enumerate(lines, start=1):
        digest, separator, name = line.partition("  ")
        parts = PurePosixPath(name).parts
        plain = bool(name) and not PurePosixPath(name).is_absolute() and ".." not in parts and "\\" not in name
        whole = len(digest) == 64 and not set(digest) - set("0123456789abcdef")
        if not (separator and whole and plain) or name in sums:
            raise PackageError(
                f"{folder / SUMS}, line {number}: expected `sha256  path inside the package`, once each. {COPY_AGAIN}"
            )
        sums[name] = digest
    return sums
