"""A package: one folder that says what it is, runs without torch, and proves that it is whole."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from medim.inference.network import Network, Run
from medim.inference.ood import Reference
from medim.package.contract import (
    GOLDEN,
    GRAPH,
    NOT_REPORTED,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    STATISTICS,
    WEIGHTS,
    Contract,
    PackageError,
    parse,
)
from medim.package.golden import Golden
from medim.package.integrity import COPY_AGAIN, SUMS, Seal, checked, verified, write_sums
from medim.package.model_card import CARD, parse_card
from medim.package.onnx_session import Session, session
from medim.types import Array, UserError, Volume

UNFIT = (ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError)  # of arrays that are others

__all__ = ["Check", "Package", "PackageError", "load_package", "session", "verify", "write_sums"]


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
        seal: SHA256SUMS and its signature.
    """

    folder: Path
    contract: Contract
    seal: Seal

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked once more, so that what is used is what was verified."""
        return checked(self.folder / name, self.sums[name])

    @property
    def sums(self) -> dict[str, str]:
        """sha256 of every file."""
        return self.seal.sums

    @property
    def sha256(self) -> str:
        """The digest of SHA256SUMS, which stands for the whole package."""
        return self.seal.sha256

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
        except UNFIT as error:
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


def load_package(path: str | Path, *, trust: Path | None = None) -> Package:
    """Open a package.

    The signature, where a key is given, and every file are checked before anything is parsed.

    Args:
        path: the package's folder.
        trust: an Ed25519 public key (PEM) that must have signed it.

    Raises:
        PackageError: a file was changed, is missing or does not belong; a link; a contract of another schema; or the
            key of `trust` did not sign it.
        UserError: `trust` is no public key.
    """
    folder = Path(path)
    seal = verified(folder, trust=trust)
    contract = parse(checked(folder / "medim.json", seal.sums["medim.json"]))
    seal.check_signer(contract.signed_by, folder)
    if contract.architecture.get("sha256") != seal.sums[WEIGHTS]:
        raise PackageError(f"{folder / WEIGHTS}: not the weights that medim.json names. {COPY_AGAIN}")
    if contract.reference and contract.reference.sha256 != seal.sums.get(STATISTICS):
        raise PackageError(f"{folder / STATISTICS}: not the statistics that medim.json names. {COPY_AGAIN}")
    if contract.score_map and not {SCORE_MAP, SCORE_MAP_GOLDEN} <= seal.sums.keys():
        raise PackageError(f"{folder}: expected {SCORE_MAP} and {SCORE_MAP_GOLDEN} too. {COPY_AGAIN}")
    return Package(folder, contract, seal)


def verify(path: str | Path, *, trust: Path | None = None) -> list[Check]:
    """Check a package's files, contract and network, and run its golden input through it.

    Args:
        path: the package's folder.
        trust: an Ed25519 public key (PEM) that must have signed it.

    Returns:
        What was checked, in order; a failed check raises.

    Raises:
        PackageError: something is not what the package says.
    """
    package = load_package(path, trust=trust)
    checks = [
        _signature(package),
        Check("files", "pass", f"{len(package.sums)} files have the sha256 that {SUMS} names"),
        Check("contract", "pass", f"{package.contract.kind} {package.contract.name} {package.contract.version}"),
    ]
    checks.append(_card(package))
    run, score_map = package.run, package.score_map
    checks.append(Check("network", "pass", "inputs and outputs are those of the signature"))
    checks.append(_golden(package, "golden", GOLDEN, run))
    if package.reference is not None:
        checks.append(Check("out-of-distribution guard", "pass", str(package.contract.reference)))
    if score_map is not None:
        checks.append(_golden(package, "score map", SCORE_MAP_GOLDEN, score_map))
    return checks


def _signature(package: Package) -> Check:
    signer = package.contract.signed_by
    if signer is None:
        return Check("signature", "not run", "the package is not signed")
    if not package.seal.trusted:
        return Check("signature", "not run", f"signed by {signer[:16]}, which says nothing without --trust KEY")
    return Check("signature", "pass", f"signed by the trusted key {signer[:16]}")


def _card(package: Package) -> Check:
    if CARD not in package.sums:
        raise PackageError(f"{package.folder}: expected a {CARD} in it. {COPY_AGAIN}")
    return Check("card", "pass", f"{parse_card(package.read(CARD)).not_reported} fields are {NOT_REPORTED}")


def _golden(package: Package, name: str, file: str, run: Run) -> Check:
    """Run a golden input and compare with its answer at export."""
    try:
        difference = Golden.parse(package.read(file)).difference(run, package.contract)
    except (UserError, *UNFIT) as error:
        raise PackageError(f"{package.folder}: the golden input cannot be run ({error}). {COPY_AGAIN}") from error
    if not difference.small:
        raise PackageError(
            f"{package.folder}: the golden input gives another answer than at export: {difference}. {COPY_AGAIN}"
        )
    return Check(name, "pass", str(difference))
