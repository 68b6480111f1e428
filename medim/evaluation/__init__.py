"""Evaluation of trained networks: metrics with intervals over subjects, and probes of frozen encoders."""
