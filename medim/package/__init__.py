"""Packages: load, verify and run an exported network without torch."""
