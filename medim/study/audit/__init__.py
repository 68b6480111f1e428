"""Audit of a study: shortcuts, groups and near-duplicates."""
