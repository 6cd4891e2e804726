"""Standard diffusion on 50 faces, 16x16: the demo's memorizing twin.

Data: scikit-image's lfw_subset (inside the wheel), 50 training and 50 held-out faces.
Cost and expected result: see the demo table in README.md.
"""

from mdiff.recipes.demo import STANDARD as config  # noqa: F401
