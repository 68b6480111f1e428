"""Estimate of time, memory and disk of a run: `medim plan`."""
