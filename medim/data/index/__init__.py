"""Index of the images of a source: `medim index`."""
