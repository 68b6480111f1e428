"""Predictions and features of a package or run: `medim predict` and `medim embed`."""
