"""Training: one pretraining module, one fine-tuning module, and the code that both need."""

import os

# Lightning sets this variable too, but only with its trainer. PyTorch reads it once, at the first matrix product on a
# GPU, which the initialisation of a head or the estimate of a study may compute before.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
