"""Models that compile fast, for tests of what is asked of a model rather than of the model."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.nets.denoiser import Model
from mdiff.nets.embeddings import Conditions
from mdiff.process.laws import make_process

SHAPE = (4, 4, 1)


class Tiny(nn.Module):
    """A perceptron over all pixels, which sees the noise level and the condition."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        h = nn.Dense(24)(x.reshape(len(x), -1)) + c_noise[:, None]
        h = jnp.tanh(h if cond is None else h + nn.Dense(24)(cond))
        return nn.Dense(x[0].size)(h).reshape(x.shape)


def tiny_model(kind="ve", classes=0):
    conditions = Conditions(classes, 0, False, 8) if classes else None
    return Model(Tiny(), conditions, make_process(config.Process(kind=kind)), 0.5, SHAPE)


class Known(nn.Module):
    """A closed-form `(x, sigma) -> x0` in a network's place, under the variance-exploding law."""

    fn: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        sigma = 80 * (c_noise / 1000) ** 7
        return self.fn(x * jnp.sqrt(1 + sigma**2)[:, None, None, None], sigma)


def known_model(fn, shape=SHAPE):
    return Model(Known(fn), None, make_process(config.Process()), 0.5, shape, "x0")


def drawn(model, scale=0.2):
    """Parameters of the right shapes by numpy: compiling `init` takes longer than what is tested."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)
