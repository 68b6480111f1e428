"""Inference without torch: from an array to logits and an out-of-distribution score."""
