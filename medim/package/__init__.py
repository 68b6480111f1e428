"""Exported packages: load, verify and run a network without torch."""
