"""Whom, when and where a DICOM header names: never written down, only to be kept out of what is."""

from __future__ import annotations

from medim.data.readers.dicom.values import Header

OWN = ("SOPInstanceUID", "AcquisitionDateTime")  # they differ from file to file
OTHERS = "OtherPatientIDsSequence"
NAMES = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson",
    "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "NameOfPhysiciansReadingStudy",
    "RequestingPhysician", "PhysiciansOfRecord", "ConsultingPhysicianName", "ScheduledPerformingPhysicianName",
    "ContentCreatorName",
)  # fmt: skip
SHARED = (
    "PatientID", "IssuerOfPatientID", "OtherPatientIDs", "PatientBirthDate", "PatientAddress",
    "PatientTelephoneNumbers", "MedicalRecordLocator", "MilitaryRank", "PatientComments", "AccessionNumber", "StudyID",
    "AdmissionID",
    "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber",
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate",
    "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "RequestedProcedureID",
    "PerformedProcedureStepID", "ClinicalTrialSubjectID", "PerformedStationName", "PerformedProcedureStepStartDate",
    "PerformedProcedureStepEndDate", "AdmittingDate", "DateOfSecondaryCapture",
)  # fmt: skip
_SHORT = ("PatientID", "AccessionNumber")  # count at any length; a StudyID of "1" is nobody's


def shared_identities(header: Header) -> set[str]:
    """Every value that tells who, when or where; names also by their parts and the other way round."""
    found = {value for keyword in SHARED for value in header.texts(keyword) if len(value) >= 3 or keyword in _SHORT}
    for value in (value for keyword in NAMES for value in header.texts(keyword)):
        for name in value.split("="):
            parts = [part for part in name.replace("^", " ").split() if part]
            found |= {name, *parts, "".join(reversed(parts)), *(a + b for a in parts for b in parts if a != b)}
    return found - {""}


def own_identities(header: Header) -> set[str]:
    """Those that differ from file to file, and those that stand in a sequence."""
    others = {value for item in header.items(OTHERS) for value in item.texts("PatientID")}
    return others | {value for keyword in OWN for value in header.texts(keyword) if len(value) >= 3}
