"""What pretraining is worth on one's own data, in labels: the runner and the statistics of `medim study`."""
