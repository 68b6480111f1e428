"""Estimate of the time, memory and disk space of a run: `medim plan`."""
