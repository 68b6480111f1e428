"""Training: one pretraining module, one fine-tuning module, and the code that both need."""
