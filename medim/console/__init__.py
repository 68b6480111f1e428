"""Progress on the terminal, or in the log where there is no terminal."""
