"""DICOM output beside the series it belongs to: segmentation (SEG) and structured report (SR)."""
