"""Paired differences between arms, and the number of labels that pretraining saves, with intervals."""
