"""Data pipeline from image files to batches: readers, index, splits, preprocessing, store and datasets."""
