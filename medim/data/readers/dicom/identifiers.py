"""Identities in a DICOM header: persons, dates and places. They are only used to remove them from every output."""

from __future__ import annotations

from medim.data.readers.dicom.values import DicomHeader

FILE_KEYWORDS = ("SOPInstanceUID", "AcquisitionDateTime")  # these differ from file to file
OTHER_IDS_SEQUENCE = "OtherPatientIDsSequence"
NAME_KEYWORDS = (
    "PatientName", "OtherPatientNames", "PatientBirthName", "PatientMotherBirthName", "ResponsiblePerson",
    "ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "NameOfPhysiciansReadingStudy",
    "RequestingPhysician", "PhysiciansOfRecord", "ConsultingPhysicianName", "ScheduledPerformingPhysicianName",
    "ContentCreatorName",
)  # fmt: skip
SHARED_KEYWORDS = (
    "PatientID", "IssuerOfPatientID", "OtherPatientIDs", "PatientBirthDate", "PatientAddress",
    "PatientTelephoneNumbers", "MedicalRecordLocator", "MilitaryRank", "PatientComments", "AccessionNumber", "StudyID",
    "AdmissionID",
    "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName", "DeviceSerialNumber",
    "StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "InstanceCreationDate",
    "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "RequestedProcedureID",
    "PerformedProcedureStepID", "ClinicalTrialSubjectID", "PerformedStationName", "PerformedProcedureStepStartDate",
    "PerformedProcedureStepEndDate", "AdmittingDate", "DateOfSecondaryCapture",
)  # fmt: skip
_SHORT_VALUE_KEYWORDS = ("PatientID", "AccessionNumber")  # used at any length; a StudyID of "1" identifies nobody


def collect_series_identities(header: DicomHeader) -> set[str]:
    """Collect all values that identify a person, time or place; names also by their parts, and in reverse order."""
    identities = {
        value
        for keyword in SHARED_KEYWORDS
        for value in header.texts(keyword)
        if len(value) >= 3 or keyword in _SHORT_VALUE_KEYWORDS
    }
    for value in (value for keyword in NAME_KEYWORDS for value in header.texts(keyword)):
        for name in value.split("="):
            parts = [part for part in name.replace("^", " ").split() if part]
            identities |= {name, *parts, "".join(reversed(parts)), *(a + b for a in parts for b in parts if a != b)}
    return identities - {""}


def collect_names(header: DicomHeader) -> set[str]:
    """Collect family, given and middle names of persons; titles such as `Dr` are left out."""
    values = (value for keyword in NAME_KEYWORDS for value in header.texts(keyword))
    return {part for value in values for name in value.split("=") for part in name.split("^")[:3] if part}


def collect_file_identities(header: DicomHeader) -> set[str]:
    """Collect the identities that differ from file to file, and those inside a sequence."""
    other_ids = {value for item in header.items(OTHER_IDS_SEQUENCE) for value in item.texts("PatientID")}
    return other_ids | {value for keyword in FILE_KEYWORDS for value in header.texts(keyword) if len(value) >= 3}
