"""DICOM files, series and multi-frame objects."""
