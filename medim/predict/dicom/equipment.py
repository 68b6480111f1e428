"""Who answers: the same words in every object that a package writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import highdicom
from highdicom.sr import AlgorithmIdentification, CodedConcept
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from medim.package.contract import Contract
from medim.package.label_codes import ConceptCode, LabelCode
from medim.version import __version__

LATERALITY_CODES = {"left": codes.SCT.Left, "right": codes.SCT.Right, "both": codes.SCT.RightAndLeft}
SEGMENTATION_SERIES, REPORT_SERIES = 9001, 9002  # numbers that a scanner does not reach


@dataclass(frozen=True)
class Equipment:
    """A package as DICOM sees it: a device with a serial number.

    Attributes:
        contract: of the package.
        sha256: of the package.
    """

    contract: Contract
    sha256: str

    @property
    def device_uid(self) -> str:
        """The same for the same package."""
        return generate_uid(entropy_srcs=["medim package", self.sha256])

    def series_attributes(self, number: int) -> dict[str, Any]:
        """A new series, with its one instance, for highdicom's constructors.

        UIDs are new each time: an answer that is given again is another object, and the standard wants another UID
        wherever content (its date, at least) differs.
        """
        contract = self.contract
        return {
            "series_instance_uid": highdicom.UID(),
            "series_number": number,
            "sop_instance_uid": highdicom.UID(),
            "instance_number": 1,
            "manufacturer": "medim",
            "manufacturer_model_name": contract.name,
            "software_versions": (contract.version[:64], f"medim {__version__}"),
            "device_serial_number": self.sha256,
            "series_description": f"AI {contract.name[:36]} {contract.version[:12]} research",
        }

    def algorithm_sequence(self) -> highdicom.AlgorithmIdentificationSequence:
        """For a segmentation."""
        name, version = self.contract.name, self.contract.version
        return highdicom.AlgorithmIdentificationSequence(
            name=name, family=codes.DCM.ArtificialIntelligence, version=version[:64], source="medim"
        )

    def algorithm_identification(self, *parameters: str) -> AlgorithmIdentification:
        """For a report."""
        return AlgorithmIdentification(self.contract.name, self.contract.version, parameters=parameters or None)


def to_coded_concept(code: ConceptCode) -> CodedConcept:
    """A code for highdicom."""
    return CodedConcept(code.value, code.scheme, code.meaning)


def build_modifiers(label: LabelCode) -> list[CodedConcept]:
    """What tells a part from its parent structure, the side last."""
    side = [CodedConcept.from_code(LATERALITY_CODES[label.laterality])] if label.laterality else []
    return [*map(to_coded_concept, label.modifiers), *side]
