"""DICOM attributes of the package as equipment, identical in all objects that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highdicom
from highdicom.sr import AlgorithmIdentification, CodedConcept
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from medim.package.contract import Contract
from medim.package.label_codes import ConceptCode, LabelCode
from medim.predict.dicom.uids import create_uid
from medim.version import __version__

LATERALITY_CODES = {"left": codes.SCT.Left, "right": codes.SCT.Right, "both": codes.SCT.RightAndLeft}
SEGMENTATION_SERIES, REPORT_SERIES = 9001, 9002  # series numbers above those of scanners


@dataclass(frozen=True)
class Equipment:
    """Package as DICOM equipment: a device with a serial number.

    Attributes:
        contract: contract of the package.
        sha256: digest of the package, used as the serial number.
    """

    contract: Contract
    sha256: str

    @property
    def device_uid(self) -> str:
        """UID of the device, derived from the digest of the package."""
        return generate_uid(entropy_srcs=["medim package", self.sha256])

    def series_attributes(self, number: int) -> dict[str, Any]:
        """Build the attributes of a new series with one instance, for the constructors of highdicom.

        UIDs are new at each call, except inside `deterministic_uids`: the standard requires a new UID if any content
        differs, and a repeated prediction has at least another date.
        """
        contract = self.contract
        return {
            "series_instance_uid": create_uid(),
            "series_number": number,
            "sop_instance_uid": create_uid(),
            "instance_number": 1,
            "manufacturer": "medim",
            "manufacturer_model_name": contract.name,
            "software_versions": (contract.version[:64], f"medim {__version__}"),
            "device_serial_number": self.sha256,
            "series_description": f"AI {contract.name[:36]} {contract.version[:12]} research",
        }

    def algorithm_sequence(self) -> highdicom.AlgorithmIdentificationSequence:
        """Build the algorithm identification of a segmentation."""
        name, version = self.contract.name, self.contract.version
        return highdicom.AlgorithmIdentificationSequence(
            name=name, family=codes.DCM.ArtificialIntelligence, version=version[:64], source="medim"
        )

    def algorithm_identification(self, *parameters: str) -> AlgorithmIdentification:
        """Build the algorithm identification of a structured report."""
        return AlgorithmIdentification(self.contract.name, self.contract.version, parameters=parameters or None)


def to_coded_concept(code: ConceptCode) -> CodedConcept:
    """Convert a code to the type of highdicom."""
    return CodedConcept(code.value, code.scheme, code.meaning)


def build_modifiers(label: LabelCode) -> list[CodedConcept]:
    """Build the codes that distinguish a part from its parent structure; the laterality is last."""
    side = [CodedConcept.from_code(LATERALITY_CODES[label.laterality])] if label.laterality else []
    return [*map(to_coded_concept, label.modifiers), *side]
