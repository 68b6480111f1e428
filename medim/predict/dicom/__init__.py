"""DICOM output that refers to the source series: segmentation (SEG) and structured report (SR)."""
