"""Deterministic preprocessing, the same code in training and in the hospital."""
