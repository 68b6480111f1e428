"""Prediction and embedding with a package: `medim predict` and `medim embed`."""
