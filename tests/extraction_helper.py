"""Images of a known smooth law, generators with a planted share of copies, and a space of hand-made features."""

import numpy as np

SIZE = 8


def law(n: int, seed: int) -> np.ndarray:
    """uint8 [n,8,8,1] from one Gaussian law, smooth as images are."""
    rng = np.random.default_rng(seed)
    places = np.arange(SIZE)
    smooth = np.exp(-((places[:, None] - places) ** 2) / 4)
    smooth /= np.linalg.norm(smooth, axis=1, keepdims=True)
    fields = smooth @ rng.normal(size=(n, SIZE, SIZE)) @ smooth.T
    return np.clip(128 + 45 * fields, 0, 255).astype(np.uint8)[..., None]


def copies(images: np.ndarray, n: int, seed: int, noise: float = 1.0) -> np.ndarray:
    """n copies of images drawn from the set, with a little noise."""
    rng = np.random.default_rng(seed)
    picked = images[rng.integers(0, len(images), n)]
    return np.clip(picked + noise * rng.normal(size=picked.shape), 0, 255).astype(np.uint8)


def partial(images: np.ndarray, n: int, share: float, seed: int) -> np.ndarray:
    """A generator that copies with this probability, and else draws from the law."""
    rng = np.random.default_rng(seed)
    copied = rng.random(n) < share
    fresh = law(n, seed + 10_000)
    fresh[copied] = copies(images, int(copied.sum()), seed)
    return fresh


class Given:
    """A space in which image number i (its first pixel) has row i."""

    name = "given"

    def __init__(self, rows):
        self.rows = np.asarray(rows, float)

    def __call__(self, images):
        return self.rows[np.asarray(images)[:, 0, 0, 0]]


def numbered(numbers: list[int], seed: int = 0) -> np.ndarray:
    """uint8 images whose first pixel is their number, and whose others are noise."""
    x = np.random.default_rng(seed).integers(0, 256, (len(numbers), SIZE, SIZE, 1), np.uint8)
    x[:, 0, 0, 0] = numbers
    return x
