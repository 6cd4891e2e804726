"""Layers, networks and preconditioning."""
