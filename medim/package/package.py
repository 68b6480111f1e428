"""Load, run and verify a package: a self-describing folder that runs without torch and contains its checksums."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from medim.data.mask_classes import to_file_values
from medim.inference.network import Predictor
from medim.inference.ood import OODDetector
from medim.integrity import (
    COPY_AGAIN,
    OPTIONAL_FILES,
    SUMS,
    ChecksumManifest,
    PackageError,
    read_with_digest,
    verify_checksums,
    write_sums,
)
from medim.package.contract import (
    GOLDEN,
    GRAPH,
    NOT_REPORTED,
    SCORE_MAP,
    SCORE_MAP_GOLDEN,
    STATISTICS,
    WEIGHTS,
    Contract,
    parse_contract,
)
from medim.package.golden import GoldenInput
from medim.package.model_card import CARD_FILE, parse_model_card
from medim.package.onnx_session import OnnxSession, load_onnx_session
from medim.tasks import is_dense
from medim.types import Array, PredictFn, UserError, Volume

ARRAY_ERRORS = (  # raised for invalid arrays
    *(ValueError, KeyError, TypeError, IndexError, OverflowError, MemoryError),
    SafetensorError,
)

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
    """Result of one check of `verify_package`.

    Attributes:
        name: name of the check.
        verdict: `pass`, or `not run` if a prerequisite is missing; a failed check raises.
        detail: measured value or reason.
    """

    name: str
    verdict: str
    detail: str


@dataclass(frozen=True, eq=False)
class Package:
    """Package whose files were verified against SHA256SUMS.

    Attributes:
        folder: folder of the package.
        contract: content of `medim.json`.
        manifest: SHA256SUMS and its signature.
    """

    folder: Path
    contract: Contract
    manifest: ChecksumManifest

    def read_file(self, name: str) -> bytes:
        """Read a file and verify its sha256 again, so that the bytes used are the bytes verified."""
        return read_with_digest(self.folder / name, self.sums[name])

    @property
    def sums(self) -> dict[str, str]:
        """sha256 of each file by relative path."""
        return self.manifest.sums

    @property
    def sha256(self) -> str:
        """Digest of SHA256SUMS, which identifies the package."""
        return self.manifest.sha256

    @functools.cached_property
    def run(self) -> OnnxSession:
        """Network in ONNX Runtime on the CPU; it computes the first output of the signature."""
        return load_onnx_session(self.read_file(GRAPH), self.contract.signature)

    @functools.cached_property
    def score_map(self) -> OnnxSession | None:
        """Mutual-information map in ONNX Runtime; None if the package has none."""
        spec = self.contract.score_map
        return load_onnx_session(self.read_file(SCORE_MAP), spec.signature, name=SCORE_MAP) if spec else None

    @functools.cached_property
    def ood_detector(self) -> OODDetector | None:
        """Out-of-distribution detector; None if the package has none."""
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
        """Network with its preprocessing, for volumes from a reader."""
        contract = self.contract
        return Predictor(
            run=self.run,
            kind=contract.kind,
            modality=contract.modality,
            spatial_dims=contract.spatial_dims,
            in_channels=contract.in_channels,
            classes=contract.classes,
            class_values=contract.spec.class_values,
            preprocessing=contract.preprocess,
            inference=contract.inference,
            score_map=self._run_score_map if contract.score_map else None,
            predict_with_features=self.run.predict_with_features,
            ood_detector=self.ood_detector,
        )

    def _run_score_map(self, image: Array) -> Array:
        """Compute scores with `score_map`; the graph is loaded at the first call."""
        assert self.score_map is not None
        return self.score_map(image)

    def __call__(self, volume: Volume) -> Array:
        """Predict one image; see `Predictor`. A label map has the values of the mask files of training."""
        prediction = self.network(volume)
        return to_file_values(prediction, self.network.class_values) if is_dense(self.contract.kind) else prediction


def load_package(path: str | Path, *, public_key: Path | None = None) -> Package:
    """Load a package after verifying its integrity.

    All files, and the signature if a key is given, are verified before any file is parsed.

    Args:
        path: folder of the package.
        public_key: Ed25519 public key (PEM) of the expected signer.

    Raises:
        PackageError: a file is modified, missing or not listed; the folder contains a link; the contract has another
            schema version; or the package is not signed by the key `public_key`.
        UserError: `public_key` is not a public key.

    Examples:
        >>> from medim import read_volume  # doctest: +SKIP
        >>> package = load_package("package", public_key=Path("public.pem"))  # doctest: +SKIP
        >>> package(read_volume("scan.nii.gz"))  # doctest: +SKIP
    """
    folder = Path(path)
    manifest = verify_checksums(folder, public_key=public_key)
    contract = parse_contract(read_with_digest(folder / "medim.json", manifest.sums["medim.json"]))
    manifest.check_signer(contract.signed_by, folder)
    required = {WEIGHTS, GRAPH, GOLDEN} | ({SCORE_MAP, SCORE_MAP_GOLDEN} if contract.score_map else set())
    if missing := sorted(required - manifest.sums.keys()):
        raise PackageError(f"{folder}: the package lacks {', '.join(missing)}. {COPY_AGAIN}")
    if contract.architecture.get("sha256") != manifest.sums[WEIGHTS]:
        raise PackageError(f"{folder / WEIGHTS}: the sha256 differs from that in medim.json. {COPY_AGAIN}")
    if contract.reference and contract.reference.sha256 != manifest.sums.get(STATISTICS):
        raise PackageError(f"{folder / STATISTICS}: the sha256 differs from that in medim.json. {COPY_AGAIN}")
    return Package(folder, contract, manifest)


def verify_package(path: str | Path, *, public_key: Path | None = None) -> list[VerificationCheck]:
    """Verify the files, contract and network of a package, and compare the prediction for its golden input.

    Args:
        path: folder of the package.
        public_key: Ed25519 public key (PEM) of the expected signer.

    Returns:
        Checks in the order of execution; a failed check raises.

    Raises:
        PackageError: a check failed.
        UserError: `public_key` is not a public key.
    """
    package = load_package(path, public_key=public_key)
    checks = [
        _check_signature(package),
        VerificationCheck("files", "pass", f"{len(package.sums)} files match {SUMS}{_format_absent_files(package)}"),
        VerificationCheck(
            "contract", "pass", f"{package.contract.kind} {package.contract.name} {package.contract.version}"
        ),
    ]
    checks.append(_check_model_card(package))
    run, score_map = package.run, package.score_map
    checks.append(VerificationCheck("network", "pass", "inputs and outputs match the signature"))
    checks.append(_check_golden_input(package, "golden", GOLDEN, run))
    if package.ood_detector is not None:
        checks.append(VerificationCheck("out-of-distribution detector", "pass", str(package.contract.reference)))
    if score_map is not None:
        checks.append(_check_golden_input(package, "score map", SCORE_MAP_GOLDEN, score_map))
    return checks


def _format_absent_files(package: Package) -> str:
    absent = sorted(OPTIONAL_FILES - package.sums.keys())
    return f"; absent, because not needed: {', '.join(absent)}" if absent else ""


def _check_signature(package: Package) -> VerificationCheck:
    signer = package.contract.signed_by
    if signer is None:
        return VerificationCheck("signature", "not run", "the package is not signed")
    if not package.manifest.trusted:
        return VerificationCheck(
            "signature", "not run", f"signed by {signer[:16]}, not verified without --public-key KEY"
        )
    return VerificationCheck("signature", "pass", f"signed by the trusted key {signer[:16]}")


def _check_model_card(package: Package) -> VerificationCheck:
    if CARD_FILE not in package.sums:
        raise PackageError(f"{package.folder}: the package lacks {CARD_FILE}. {COPY_AGAIN}")
    return VerificationCheck(
        "card", "pass", f"{parse_model_card(package.read_file(CARD_FILE)).not_reported} fields are {NOT_REPORTED}"
    )


def _check_golden_input(package: Package, name: str, file: str, run: PredictFn) -> VerificationCheck:
    """Run a golden input and compare the output with that at export."""
    try:
        difference = GoldenInput.parse(package.read_file(file)).compare_run(run, package.contract)
    except (UserError, *ARRAY_ERRORS) as error:
        raise PackageError(f"{package.folder}: the golden input cannot be run ({error}). {COPY_AGAIN}") from error
    if not difference.is_small:
        raise PackageError(
            f"{package.folder}: the output for the golden input differs from that at export: {difference}. {COPY_AGAIN}"
        )
    return VerificationCheck(name, "pass", str(difference))
