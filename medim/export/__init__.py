"""Export of a trained network as a package: `medim export`."""
