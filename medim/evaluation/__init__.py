"""How good a trained network is: metrics with intervals over subjects, features' health, one report page."""
