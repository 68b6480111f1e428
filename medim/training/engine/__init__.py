"""Trainer, processes, checkpoints and optimiser, shared by pretraining and fine-tuning."""
