"""Measurements: what was copied, how often, how sure we are, and at what quality."""
