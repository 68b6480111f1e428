"""Deterministic preprocessing, the same code in training and at inference."""
