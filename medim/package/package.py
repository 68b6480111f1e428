"""A package: one folder that says what it is, runs without torch, and proves that it is whole."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from medim.inference.network import PredictFn, Predictor
from medim.inference.ood import OODDetector
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
    parse_contract,
)
from medim.package.golden import GoldenInput
from medim.package.integrity import COPY_AGAIN, SUMS, ChecksumManifest, read_with_digest, verify_checksums, write_sums
from medim.package.model_card import CARD_FILE, parse_model_card
from medim.package.onnx_session import OnnxSession, load_onnx_session
from medim.types import Array, UserError, Volume

ARRAY_ERRORS = (ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError)  # of arrays that are others

__all__ = [
    "Package",
    "PackageError",
    "VerificationCheck",
    "load_onnx_session",
    "load_package",
    "verify_package",
    "write_sums",
]


@dataclass(frozen=True)
class VerificationCheck:
    """One thing that `verify_package` looked at.

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
        manifest: SHA256SUMS and its signature.
    """

    folder: Path
    contract: Contract
    manifest: ChecksumManifest

    def read_file(self, name: str) -> bytes:
        """The bytes of a file, checked once more, so that what is used is what was verified."""
        return read_with_digest(self.folder / name, self.sums[name])

    @property
    def sums(self) -> dict[str, str]:
        """sha256 of every file."""
        return self.manifest.sums

    @property
    def sha256(self) -> str:
        """The digest of SHA256SUMS, which stands for the whole package."""
        return self.manifest.sha256

    @functools.cached_property
    def run(self) -> OnnxSession:
        """The network under ONNX Runtime, on the CPU; the first output of the signature for an input inside it."""
        return load_onnx_session(self.read_file(GRAPH), self.contract.signature)

    @functools.cached_property
    def score_map(self) -> OnnxSession | None:
        """The mutual-information map under ONNX Runtime; None where the package holds none."""
        spec = self.contract.score_map
        return load_onnx_session(self.read_file(SCORE_MAP), spec.signature, name=SCORE_MAP) if spec else None

    @functools.cached_property
    def ood_detector(self) -> OODDetector | None:
        """What the out-of-distribution guard compares with; None where the package holds none."""
        if self.contract.reference is None:
            return None
        try:
            detector = OODDetector.parse(self.read_file(STATISTICS))
            if (feature_count := len(detector.gaussians["features"].mean)) != self.contract.signature.outputs[-1].shape[
                1
            ]:
                raise ValueError(f"{feature_count} features")
        except ARRAY_ERRORS as error:
            raise PackageError(f"{self.folder / STATISTICS}: cannot be read ({error}). {COPY_AGAIN}") from error
        return detector

    @functools.cached_property
    def network(self) -> Predictor:
        """The network with its preprocessing, ready for images as a reader gives them."""
        contract = self.contract
        return Predictor(
            run=self.run,
            kind=contract.kind,
            modality=contract.modality,
            spatial_dims=contract.spatial_dims,
            in_channels=contract.in_channels,
            classes=contract.classes,
            preprocessing=contract.preprocess,
            inference=contract.inference,
            score_map=self._run_score_map if contract.score_map else None,
            predict_with_features=self.run.predict_with_features,
            ood_detector=self.ood_detector,
        )

    def _run_score_map(self, image: Array) -> Array:
        """`score_map`, whose graph is read with the first image that asks for one."""
        assert self.score_map is not None
        return self.score_map(image)

    def __call__(self, volume: Volume) -> Array:
        """Answer for one image; see `Predictor`."""
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
    manifest = verify_checksums(folder, trust=trust)
    contract = parse_contract(read_with_digest(folder / "medim.json", manifest.sums["medim.json"]))
    manifest.check_signer(contract.signed_by, folder)
    if contract.architecture.get("sha256") != manifest.sums[WEIGHTS]:
        raise PackageError(f"{folder / WEIGHTS}: not the weights that medim.json names. {COPY_AGAIN}")
    if contract.reference and contract.reference.sha256 != manifest.sums.get(STATISTICS):
        raise PackageError(f"{folder / STATISTICS}: not the statistics that medim.json names. {COPY_AGAIN}")
    if contract.score_map and not {SCORE_MAP, SCORE_MAP_GOLDEN} <= manifest.sums.keys():
        raise PackageError(f"{folder}: expected {SCORE_MAP} and {SCORE_MAP_GOLDEN} too. {COPY_AGAIN}")
    return Package(folder, contract, manifest)


def verify_package(path: str | Path, *, trust: Path | None = None) -> list[VerificationCheck]:
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
        _check_signature(package),
        VerificationCheck("files", "pass", f"{len(package.sums)} files have the sha256 that {SUMS} names"),
        VerificationCheck(
            "contract", "pass", f"{package.contract.kind} {package.contract.name} {package.contract.version}"
        ),
    ]
    checks.append(_check_model_card(package))
    run, score_map = package.run, package.score_map
    checks.append(VerificationCheck("network", "pass", "inputs and outputs are those of the signature"))
    checks.append(_check_golden_input(package, "golden", GOLDEN, run))
    if package.ood_detector is not None:
        checks.append(VerificationCheck("out-of-distribution guard", "pass", str(package.contract.reference)))
    if score_map is not None:
        checks.append(_check_golden_input(package, "score map", SCORE_MAP_GOLDEN, score_map))
    return checks


def _check_signature(package: Package) -> VerificationCheck:
    signer = package.contract.signed_by
    if signer is None:
        return VerificationCheck("signature", "not run", "the package is not signed")
    if not package.manifest.trusted:
        return VerificationCheck(
            "signature", "not run", f"signed by {signer[:16]}, which says nothing without --public-key KEY"
        )
    return VerificationCheck("signature", "pass", f"signed by the trusted key {signer[:16]}")


def _check_model_card(package: Package) -> VerificationCheck:
    if CARD_FILE not in package.sums:
        raise PackageError(f"{package.folder}: expected a {CARD_FILE} in it. {COPY_AGAIN}")
    return VerificationCheck(
        "card", "pass", f"{parse_model_card(package.read_file(CARD_FILE)).not_reported} fields are {NOT_REPORTED}"
    )


def _check_golden_input(package: Package, name: str, file: str, run: PredictFn) -> VerificationCheck:
    """Run a golden input and compare with its answer at export."""
    try:
        difference = GoldenInput.parse(package.read_file(file)).compare_run(run, package.contract)
    except (UserError, *ARRAY_ERRORS) as error:
        raise PackageError(f"{package.folder}: the golden input cannot be run ({error}). {COPY_AGAIN}") from error
    if not difference.is_small:
        raise PackageError(
            f"{package.folder}: the golden input gives another answer than at export: {difference}. {COPY_AGAIN}"
        )
    return VerificationCheck(name, "pass", str(difference))
