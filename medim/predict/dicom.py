"""Answers in DICOM, beside the series they are of: a segmentation (SEG) and a report (SR)."""
