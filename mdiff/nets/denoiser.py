"""From a network to a denoiser: EDM preconditioning (arXiv 2206.00364, eq. 7 and table 1).

D(xt, sigma) = c_skip xt + c_out F(c_in xt, c_noise),
c_skip = sd^2 / (s^2 + sd^2),  c_out = s sd / sqrt(s^2 + sd^2),
c_in = 1 / sqrt(s^2 + sd^2),   c_noise = ln(s) / 4.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.nets import unet
from mdiff.nets.layers import BIASES, GATES, TAPS
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.process.laws import make_process
from mdiff.trees import named_leaves
from mdiff.types import Array, Denoiser, Key, Params, Prediction


@dataclass(frozen=True)
class Model:
    """A preconditioned network under a process; parameters are passed in, never held.

    Attributes:
      net: module `(x, c_noise, cond, train) -> [B,H,W,C]`.
      embedding: module `(label [B]) -> cond [B,E]`, or None.
      process: the noise law that gives times their meaning.
      sigma_data: standard deviation of the data assumed by the preconditioning.
      shape: (H, W, C) of one image.
    """

    net: nn.Module
    embedding: nn.Module | None
    process: GaussianProcess
    sigma_data: float
    shape: tuple[int, int, int]

    def init(self, key: Key) -> Params:
        """Fresh parameters, `{"net": …}` and `{"embedding": …}` when there are labels."""
        key_net, key_embedding = jax.random.split(key)
        x, c, cond = jnp.zeros((1, *self.shape)), jnp.zeros((1,)), None
        params = {}
        if self.embedding is not None:
            label = jnp.zeros((1,), jnp.int32)
            params["embedding"] = self.embedding.init(key_embedding, label)["params"]
            cond = self.embedding.apply({"params": params["embedding"]}, label)
        params["net"] = self.net.init(key_net, x, c, cond)["params"]
        return params

    def embed(self, params: Params, label: Array | None) -> Array | None:
        """Conditions [B,E] of the labels [B]; None for a model without labels."""
        if self.embedding is None or label is None:
            return None
        cond: Array = self.embedding.apply({"params": params["embedding"]}, label)  # type: ignore[assignment]
        return cond

    def gates(self) -> Params:
        """All gates of the network, set to one: the identity ablation."""
        x, c = jnp.zeros((1, *self.shape)), jnp.zeros((1,))
        shapes = jax.eval_shape(lambda: self.net.init(jax.random.key(0), x, c))[GATES]
        return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def apply(
        self,
        params: Params,
        xt: Array,
        t: Array,
        cond: Array | None = None,
        gates: Params | None = None,
        attn_bias: Params | None = None,
        taps: tuple[str, ...] = (),
        dropout_key: Key | None = None,
    ) -> tuple[Prediction, dict[str, Array]]:
        """Denoise, optionally with an ablation and with activations returned.

        Args:
          params: from `init`.
          xt: [B,H,W,C] noisy images.
          t: [B] times in [0, 1].
          cond: [B,E] condition, already embedded, or None.
          gates: a pytree like `gates()`; None leaves every neuron on.
          attn_bias: `{layer: {"attention": {"bias": array}}}`, added to that layer's attention logits.
          taps: glob patterns over activation names, such as "mid8_0/hidden" or "*/attention/map".
          dropout_key: turns dropout on; None is deterministic.

        Returns:
          The prediction, and `{name: activation}` of the requested taps.
        """
        sigma, sd = self.process.noise_level(t), self.sigma_data
        scale = jnp.sqrt(sigma**2 + sd**2)
        # VP and flow states are brought to unit signal scale; for VE alpha is 1.
        x = xt / bcast(self.process.alpha(t), xt)
        c_noise = jnp.log(jnp.maximum(sigma, 1e-20)) / 4

        variables: dict[str, Any] = {"params": params["net"]}
        if gates is not None:
            variables[GATES] = gates
        if attn_bias is not None:
            variables[BIASES] = attn_bias
        out, state = self.net.apply(
            variables,
            x / bcast(scale, x),
            c_noise,
            cond,
            train=dropout_key is not None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            mutable=[TAPS] if taps else [],
        )
        x0 = bcast(sd**2 / scale**2, x) * x + bcast(sigma * sd / scale, x) * out.astype(jnp.float32)
        named = named_leaves(state.get(TAPS, {}))
        tapped = {name: leaf for name, leaf in named if any(fnmatch.fnmatch(name, tap) for tap in taps)}
        return self.process.from_x0(xt, x0, t), tapped

    def denoiser(self, params: Params, gates: Params | None = None) -> Denoiser:
        """The restriction samplers and probes see: `(xt, t, cond) -> Prediction`."""

        def denoise(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
            return self.apply(params, xt, t, cond, gates)[0]

        return denoise


def make_model(cfg: config.Config, channels: int) -> Model:
    """The model a config describes, for images with `channels` channels.

    Raises:
      UserError: the network cannot process the image size (see `unet.check`).
    """
    unet.check(cfg.net, cfg.data.size)
    embedding = unet.LabelEmbedding(cfg.net.classes, cfg.net.channels) if cfg.net.classes else None
    shape = (cfg.data.size, cfg.data.size, channels)
    return Model(unet.UNet(cfg.net), embedding, make_process(cfg.process), cfg.net.sigma_data, shape)


def from_sigma_fn(fn: Callable[[Array, Array], Array], process: GaussianProcess) -> Denoiser:
    """A user's own `fn(x [B,H,W,C], sigma [B]) -> x0` as a Denoiser.

    `fn` sees images at unit signal scale with noise of standard deviation sigma added (EDM's form),
    whatever the process.
    """

    def denoiser(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
        x = xt / bcast(process.alpha(t), xt)
        return process.from_x0(xt, fn(x, process.noise_level(t)), t)

    return denoiser
