"""HTML page of a study."""
