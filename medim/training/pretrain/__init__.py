"""Self-supervised pretraining of an encoder: `medim pretrain`."""
