"""Audit of a study: duplicates across splits, shortcuts and subject groups."""
