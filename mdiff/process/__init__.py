"""Noise schedules, the Gaussian process, training times and sampling grids."""
