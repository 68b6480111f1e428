"""Training: one pretraining module, one fine-tuning module, and what both need."""
