"""Probes of a frozen encoder: classifiers, baselines and label budgets of `medim probe`."""
