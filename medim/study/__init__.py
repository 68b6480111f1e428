"""What pretraining is worth on one's own data, in labels: the statistics of `medim study`."""
