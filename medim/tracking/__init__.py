"""MLflow tracking that tolerates an unreachable server."""
