"""Embeddings that similarity and quality are measured in."""
