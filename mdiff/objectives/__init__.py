"""Training objectives: each returns one loss per example."""
