"""Samplers: Denoiser in, images out."""
