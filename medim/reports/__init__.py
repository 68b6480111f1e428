"""Self-contained HTML pages about runs, evaluations, indexes and packages: `medim report`."""
