"""Simulated cohort of brain MRI: `medim example`."""
