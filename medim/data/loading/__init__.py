"""Store of preprocessed images, splits, and data sets for training."""
