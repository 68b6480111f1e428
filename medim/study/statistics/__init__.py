"""Paired differences between arms and the labels that pretraining saves, with intervals."""
