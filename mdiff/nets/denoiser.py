"""From a network to a denoiser: what its input, its time and its output are.

EDM's preconditioning (arXiv 2206.00364, eq. 7 and table 1) is stated for x = xt / alpha at the noise level
s = sigma / alpha. Multiplied out, with the data's standard deviation sd, it is finite at alpha = 0 too:

    x0 = c_skip xt + c_out F(c_in xt, c_noise),    r^2 = sigma^2 + alpha^2 sd^2,
    c_skip = alpha sd^2 / r^2,  c_out = sigma sd / r,  c_in = 1 / r,  c_noise = ln(s) / 4.

Otherwise F is x0, eps, v or the velocity itself, of a network that sees xt (for the variance-exploding process
xt / sqrt(1 + sigma^2)) and 1000 t.

A model of damaged images (`mdiff.data.damage`) also sees, in one more channel, what is left of xt. All of the above
have an output that fades with the noise level, x0 = skip xt + gain F with gain -> 0, since xt then says what x0 is.
It does not where a pixel is hidden: there the gain is that of pure noise, sd for EDM's and else 1, or more.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdiff import config
from mdiff.data import damage as damages
from mdiff.errors import UserError
from mdiff.nets import dit, unet
from mdiff.nets.check import check
from mdiff.nets.embeddings import Conditions, LevelUncertainty
from mdiff.nets.layers import BIASES, GATES, TAPS
from mdiff.nets.text import TextEncoder
from mdiff.nets.unet import Carry
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.process.laws import VarianceExploding, make_process
from mdiff.trees import named_leaves
from mdiff.types import Array, Denoiser, Key, Params, Prediction


@dataclass(frozen=True)
class Model:
    """A preconditioned network under a process; parameters are passed in, never held.

    Attributes:
      net: module `(x, c_noise, cond, train) -> [B,H,W,C]`.
      embedding: module `(entries, n, drop) -> cond [B,E]`, or None for an unconditional model.
      process: the noise law that gives times their meaning.
      sigma_data: standard deviation of the data assumed by the preconditioning.
      shape: (H, W, C) of one image.
      prediction: what the output stands for, as in `config.Net`.
      uncertainty: module `(c_noise [B]) -> u [B]` of the learned loss weight, or None.
      damage: how the images it is trained on are damaged, or None.
    """

    net: nn.Module
    embedding: nn.Module | None
    process: GaussianProcess
    sigma_data: float
    shape: tuple[int, int, int]
    prediction: str = "edm"
    uncertainty: nn.Module | None = None
    damage: damages.Damage | None = None

    def init(self, key: Key) -> Params:
        """Fresh parameters: `{"net": …}`, `{"embedding": …}` of conditions, `{"uncertainty": …}` of the loss."""
        key_net, key_embedding = jax.random.split(key)
        x, c, cond = self._blank(), jnp.zeros((1,)), None
        params = {}
        if self.embedding is not None:
            params["embedding"] = self.embedding.init(key_embedding, {}, 1)["params"]
            cond = self.condition(params, {}, n=1)
        params["net"] = self.net.init(key_net, x, c, cond).get("params", {})
        if self.uncertainty is not None:
            params["uncertainty"] = self.uncertainty.init(jax.random.fold_in(key, 2), c)["params"]
        return params

    def condition(
        self,
        params: Params,
        batch: Mapping[str, Array],
        n: int | None = None,
        drop: Array | None = None,
        gates: Params | None = None,
    ) -> Array | None:
        """The condition of a batch, as one embedding per example.

        Args:
          params: from `init`.
          batch: entries `label` int [B], `vector` [B,V], `augment` [B,9], or `tokens` int [B,L], are used as far as
            the model has such a condition; a missing one is null. Other entries are ignored.
          n: the batch size B; needed only when `batch` is empty.
          drop: [B] bool, examples whose label, vector or caption becomes null (classifier-free training).
          gates: of a text encoder, a pytree like `text_gates()`; None leaves every neuron on.

        Returns:
          [B,E] float32, of a text-conditional model [B,L,E]; None for an unconditional model. `condition(params, {}, n=B)` is the null condition.

        Raises:
          UserError: a condition has another width than the model's, or the batch size is unknown.
        """
        if self.embedding is None:
            return None
        if n is None:
            if not batch:
                raise UserError("condition: the batch is empty; give its size n")
            n = len(next(iter(batch.values())))
        variables = {"params": params["embedding"], **({} if gates is None else {GATES: gates})}
        cond: Array = self.embedding.apply(variables, batch, n, drop)  # type: ignore[assignment]
        return cond

    def log_variance(self, params: Params, sigma: Array) -> Array | None:
        """The learned log variance u [B] of the loss at noise levels sigma [B]; None unless it is learned."""
        if self.uncertainty is None:
            return None
        c_noise = _c_noise(jnp.ones_like(sigma), sigma)
        u: Array = self.uncertainty.apply({"params": params["uncertainty"]}, c_noise)  # type: ignore[assignment]
        return u

    def gates(self) -> Params:
        """All gates of the network, set to one: the identity ablation."""
        x, c = self._blank(), jnp.zeros((1,))
        shapes = jax.eval_shape(lambda: self.net.init(jax.random.key(0), x, c))[GATES]
        return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def text_gates(self) -> Params:
        """All gates of the text encoder, set to one; none for another condition."""
        if self.embedding is None:
            return {}
        shapes = jax.eval_shape(lambda: self.embedding.init(jax.random.key(0), {}, 1))  # type: ignore[union-attr]
        return jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes.get(GATES, {}))

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
        seen: Array | None = None,
        resume: tuple[str, Carry] | None = None,
    ) -> tuple[Prediction, dict[str, Array]]:
        """Denoise, optionally with an ablation and with activations returned.

        Args:
          params: from `init`.
          xt: [B,H,W,C] noisy images; with `seen` what is seen of them, A~ xt.
          t: [B] times in [0, 1].
          cond: [B,E] condition, already embedded; None is the null condition.
          gates: a pytree like `gates()`; None leaves every neuron on.
          attn_bias: `{layer: {"attention": {"bias": array}}}`, added to that layer's attention logits
            [B,heads,Q,K].
          taps: glob patterns over activation names, such as "mid8_0/hidden" or "*/attention/map".
          dropout_key: turns dropout on; None is deterministic.
          seen: [B,H,W,1], for a model of damaged images: A~ (`Damage`). None is nothing hidden, which such a model
            never met in training: its answer is an extrapolation.
          resume: of a U-Net, a block's name and what `carry` gave before it: only the rest is computed.

        Returns:
          The prediction, and `{name: activation}` of the requested taps.
        """
        if self.damage is not None:
            seen = self.damage.nothing(xt) if seen is None else seen
        x, c_noise = self._inputs(xt, t, seen)
        cond = self.condition(params, {}, n=len(xt)) if cond is None else cond
        variables: dict[str, Any] = {"params": params["net"]}
        if gates is not None:
            variables[GATES] = gates
        if attn_bias is not None:
            variables[BIASES] = attn_bias
        rest: dict[str, Any] = {} if resume is None else {"start": resume[0], "carry": resume[1]}
        out, state = self.net.apply(
            variables,
            x,
            c_noise,
            cond,
            train=dropout_key is not None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            mutable=[TAPS] if taps else [],
            **rest,
        )
        named = named_leaves(state.get(TAPS, {}))
        tapped = {name: leaf for name, leaf in named if any(fnmatch.fnmatch(name, tap) for tap in taps)}
        out = out.astype(jnp.float32)
        if self.damage is not None and seen is not None:
            # The networks give as many channels as they take: that of `seen` is left over.
            out = out[..., : xt.shape[-1]] * self._lift(self.damage.hidden(seen), t)
        return self._complete(xt, out, t), tapped

    def carry(
        self,
        params: Params,
        xt: Array,
        t: Array,
        cond: Array | None,
        before: str,
        gates: Params | None = None,
    ) -> Carry:
        """What a U-Net has computed before its block `before`, for `apply(..., resume=(before, carry))`.

        What comes after does not change it: ablations of later layers share it.

        Raises:
          ValueError: the network has no such block.
        """
        names = [stage.name for stage in unet.stages(self.net.cfg, self.shape[0] // self.net.cfg.patch)]
        if before not in names:
            raise ValueError(before)
        x, c_noise = self._inputs(xt, t, None)
        variables = {"params": params["net"], **({} if gates is None else {GATES: gates})}
        found: Carry = self.net.apply(variables, x, c_noise, cond, stop=before)  # type: ignore[assignment]
        return found

    def _blank(self) -> Array:
        """Zeros [1,H,W,·] as wide as what the network sees."""
        height, width, channels = self.shape
        return jnp.zeros((1, height, width, channels + (self.damage is not None)))

    def _inputs(self, xt: Array, t: Array, seen: Array | None) -> tuple[Array, Array]:
        """What the network sees: the image at unit scale [B,H,W,·], with `seen` behind it, and the noise level's number [B]."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        x, c_noise = xt, 1000 * t
        if self.prediction == "edm":
            x, c_noise = xt / bcast(self._scale(alpha, sigma), xt), _c_noise(alpha, sigma)
        elif isinstance(self.process, VarianceExploding):
            x = xt / bcast(jnp.sqrt(1 + sigma**2), xt)
        return x if seen is None else jnp.concatenate([x, seen.astype(x.dtype)], axis=-1), c_noise

    def _complete(self, xt: Array, out: Array, t: Array) -> Prediction:
        """The prediction that the network's output [B,H,W,C] stands for."""
        if self.prediction != "edm":
            complete: Callable[..., Prediction] = getattr(self.process, f"from_{self.prediction}")
            return complete(xt, out, t)
        alpha, sigma, sd = self.process.alpha(t), self.process.sigma(t), self.sigma_data
        scale = self._scale(alpha, sigma)
        x0 = bcast(alpha * sd**2 / scale**2, xt) * xt + bcast(sigma * sd / scale, xt) * out
        return self.process.from_x0(xt, x0, t)

    def _lift(self, hidden: Array, t: Array) -> Array:
        """What the output is multiplied with, [B,H,W,1]: 1, or more where a pixel is hidden and the gain too small."""
        one = jnp.ones((len(t), 1, 1, 1))
        gain = jnp.abs(self._complete(jnp.zeros_like(one), one, t).x0)
        least = self.sigma_data if self.prediction == "edm" else 1.0
        return jnp.where(hidden, jnp.maximum(least / jnp.maximum(gain, 1e-20), 1.0), 1.0)

    def _scale(self, alpha: Array, sigma: Array) -> Array:
        return jnp.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)

    def denoiser(self, params: Params, gates: Params | None = None, seen: Array | None = None) -> Denoiser:
        """The restriction samplers and probes see: `(xt, t, cond) -> Prediction`.

        Args:
          params: from `init`.
          gates: as in `apply`.
          seen: [B,H,W,1], for a model of damaged images: each xt [B,H,W,C] is looked at through this one A~. A batch
            k times as long has k rows in turn for each (guidance asks for pairs).
        """

        def denoise(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
            if self.damage is None or seen is None:
                return self.apply(params, xt, t, cond, gates)[0]
            through = jnp.repeat(seen, len(xt) // len(seen), axis=0)
            visible = self.damage.apply(xt, through)
            x0 = self.apply(params, visible, t, cond, gates, seen=through)[0].x0
            return self.process.from_x0(xt, x0, t)

        return denoise


def _c_noise(alpha: Array, sigma: Array) -> Array:
    return (jnp.log(jnp.maximum(sigma, 1e-20)) - jnp.log(jnp.maximum(alpha, 1e-20))) / 4


def make_model(cfg: config.Config, channels: int) -> Model:
    """The model a config describes, for images with `channels` channels.

    Raises:
      UserError: the network cannot process the image size (see `check.check`).
    """
    net, augment = cfg.net, cfg.data.augment > 0
    check(net, cfg.data.size)
    is_dit = net.arch == "dit"
    width = net.channels if is_dit else unet.condition_width(net)
    embedding: nn.Module | None = None
    if net.text:
        embedding = TextEncoder(net.text, net.text_blocks, net.text_length, net.vocabulary)
    elif net.classes or net.vector or augment:
        embedding = Conditions(net.classes, net.vector, augment, width)
    return Model(
        net=dit.DiT(net) if is_dit else unet.UNet(net),
        embedding=embedding,
        process=make_process(cfg.process),
        sigma_data=net.sigma_data,
        shape=(cfg.data.size, cfg.data.size, channels),
        prediction=net.prediction,
        uncertainty=LevelUncertainty() if cfg.loss.level_weight == "learned" else None,
        damage=damages.make(cfg),
    )


def from_sigma_fn(fn: Callable[[Array, Array], Array], process: GaussianProcess) -> Denoiser:
    """A user's own `fn(x [B,H,W,C], sigma [B]) -> x0` as a Denoiser.

    `fn` sees images at unit signal scale with noise of standard deviation sigma added (EDM's form),
    whatever the process.
    """

    def denoiser(xt: Array, t: Array, cond: Array | None = None) -> Prediction:
        x = xt / bcast(process.alpha(t), xt)
        return process.from_x0(xt, fn(x, process.noise_level(t)), t)

    return denoiser
