"""Inference without torch: logits and an out-of-distribution score of an image array."""
