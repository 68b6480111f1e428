"""Preprocessed images on disk, their splits, and the datasets that training reads."""
