"""Fine-tuning of an encoder on labels: `medim finetune`."""
