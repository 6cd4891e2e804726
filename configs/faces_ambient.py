"""Ambient diffusion (arXiv 2502.21278) on the same 50 faces: the demo's other twin.

Differs from configs/faces.py in one field, `loss.cutoff`.
Cost and expected result: see the demo table in README.md.
"""

from mdiff.recipes.demo import AMBIENT as config  # noqa: F401
