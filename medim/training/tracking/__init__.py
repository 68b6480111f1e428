"""MLflow tracking that survives an unreachable server."""
