"""Download of public data sets: `medim fetch`."""
