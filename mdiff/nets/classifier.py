"""A classifier of noisy images that is told the noise level: p(c | xt, t), for guidance.

The network sees xt / r with r^2 = sigma^2 + alpha^2 sd^2, which has unit variance at every noise level, and ln(sigma / alpha) / 4:
EDM's scaling of input and level (arXiv 2206.00364, table 1). Its logits are divided by a temperature of the noise level, which
makes them calibrated probabilities (arXiv 1706.04599); that, and the statistics of batch normalization, are part of the
parameters, so that one compiled program serves every classifier of one shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config, side
from mdiff.errors import UserError
from mdiff.nets.embeddings import noise_embedding
from mdiff.nets.layers import Conv, Dense, attend, conv_scan_safe, edm_init, group_norm
from mdiff.nets.resample import downsample
from mdiff.nets.unet import Block
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.types import Array, Key, Params

STATISTICS = "batch_stats"
"""Flax's name of the collection that batch normalization keeps its means and variances in."""

ATTENTION = (16, 8, 4)
"""Resolutions of the half U-Net that have self-attention."""


def _norm(x: Array, kind: str, name: str, train: bool) -> Array:
    """Group or batch normalization of x [B,H,W,C]; call inside a compact method."""
    if kind == "group":
        return group_norm(x, name, 1e-5)
    # Momentum 0: what is stored is the last batch's own, of which `Classifier.moments` makes an average.
    return nn.BatchNorm(use_running_average=not train, momentum=0.0, name=name)(x)


def _embed(c_noise: Array, width: int) -> Array:
    """[B, 4 width] from the noise level's number [B]; call inside a compact method."""
    emb = noise_embedding(c_noise, width)
    for i in range(2):
        emb = nn.silu(Dense(4 * width, name=f"emb{i}")(emb))
    return emb


class AnyConv(nn.Module):
    """3x3 stride-1 convolution without bias, also of maps of 2x2 and 1x1.

    Those go through one matrix product, for which XLA:CPU takes a fortieth of the time of their convolution.
    """

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        (b, h, w, c), features = x.shape, self.features
        kernel = jnp.asarray(self.param("kernel", edm_init(), (3, 3, c, features)))
        if h * w > 4:
            return conv_scan_safe(x, kernel)
        around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = [around[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        rows = jnp.concatenate(windows, axis=-1).reshape(b * h * w, 9 * c)
        return (rows @ kernel.reshape(9 * c, features)).reshape(b, h, w, features)


class TimedBlock(nn.Module):
    """ResNet's basic block (arXiv 1512.03385); the time scales and shifts what its first norm gives, from zero on."""

    features: int
    norm: str
    halve: bool = False
    train: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array | None) -> Array:
        x = downsample(x) if self.halve else x
        h = AnyConv(self.features, name="conv0")(x)
        h = _norm(h, self.norm, "norm0", self.train)
        if emb is not None:
            told = Dense(2 * self.features, scale=0.0, name="time")(emb)[:, None, None, :]
            scale, shift = jnp.split(told, 2, axis=-1)
            h = h * (1 + scale) + shift
        h = AnyConv(self.features, name="conv1")(nn.relu(h))
        h = _norm(h, self.norm, "norm1", self.train)
        if x.shape[-1] != self.features:
            x = _norm(Dense(self.features, bias=False, name="skip")(x), self.norm, "norm_skip", self.train)
        return nn.relu(x + h)


class TimedResNet(nn.Module):
    """`(x [B,H,W,C], c_noise [B]) -> logits [B,K]`: ResNet with the stem of small images (3x3, no pooling).

    Stages halve the resolution by the 2x2 mean before their first block, not by a strided convolution: its gradient is
    slow on CPU. Gradients are reverse mode only, and as fast in a scan as outside of one.
    """

    classes: int
    width: int
    blocks: tuple[int, ...]
    norm: str = "group"
    timed: bool = True

    @nn.compact
    def __call__(self, x: Array, c_noise: Array, train: bool = False) -> Array:
        emb = _embed(c_noise, self.width) if self.timed else None
        x = AnyConv(self.width, name="conv_in")(x)
        x = nn.relu(_norm(x, self.norm, "norm_in", train))
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                halve = stage > 0 and i == 0
                x = TimedBlock(self.width << stage, self.norm, halve, train, name=f"stage{stage}_{i}")(x, emb)
        return Dense(self.classes, name="out")(x.mean((1, 2)))


class HalfUNet(nn.Module):
    """`(x [B,H,W,C], c_noise [B]) -> logits [B,K]`: the encoder of the ADM U-Net, pooled by attention.

    The classifier of arXiv 2105.05233 (section 4 and appendix I): the mean over positions asks, all positions answer.
    """

    classes: int
    width: int
    blocks: tuple[int, ...]
    timed: bool = True

    @nn.compact
    def __call__(self, x: Array, c_noise: Array, train: bool = False) -> Array:
        cfg = config.Net(arch="adm", channels=self.width, scan_safe=True)
        emb = _embed(c_noise, self.width) if self.timed else jnp.zeros((len(x), 4 * self.width))
        x = Conv(self.width, scan_safe=True, name="conv_in")(x)
        for stage, count in enumerate(self.blocks):
            if stage:
                x = Block(cfg, x.shape[-1], resample="down", train=train, name=f"stage{stage}_down")(x, emb)
            for i in range(count):
                block = Block(
                    cfg, self.width << stage, x.shape[1] in ATTENTION, train=train, name=f"stage{stage}_{i}"
                )
                x = block(x, emb)
        x = nn.silu(group_norm(x, "norm_out", 1e-5)).reshape(len(x), -1, x.shape[-1])
        tokens = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        pooled = attend(self, Dense(3 * x.shape[-1], name="pool")(tokens), 0)[:, 0]
        return Dense(self.classes, name="out")(pooled)


@dataclass(frozen=True)
class Classifier:
    """A network of noisy images under a process; parameters are passed in, never held.

    Its parameters are `{"net": …}` while it trains, and with what is measured afterwards also `{"temperature": …}` (see
    `temperatures`) and, with batch normalization, `{"batch_stats": …}` (see `moments`). No optimizer sees those two.

    Attributes:
      net: module `(x, c_noise, train) -> [B,K]`.
      process: the noise law that gives times their meaning.
      sigma_data: standard deviation of the data, for the input's scale.
      shape: (H, W, C) of one image.
      classes: K.
      timed: off, neither the network nor its input's scale knows the time.
      batch_norm: does `net` keep statistics?
    """

    net: nn.Module
    process: GaussianProcess
    sigma_data: float
    shape: tuple[int, int, int]
    classes: int
    timed: bool = True
    batch_norm: bool = False

    def init(self, key: Key) -> Params:
        """Fresh parameters: `{"net": …}`."""
        return {"net": self.net.init(key, jnp.zeros((1, *self.shape)), jnp.zeros((1,)))["params"]}

    def logits(self, params: Params, xt: Array, t: Array, train: bool = False) -> Array:
        """Unnormalized log p(c | xt), divided by the temperature of the noise level if `params` hold one.

        Args:
          params: from `init` or of a finished classifier.
          xt: [B,H,W,C] noisy images.
          t: [B] times in [0, 1].
          train: normalize with the batch's own statistics (batch normalization only).

        Returns:
          [B,K] float32.
        """
        out: Array
        if self.batch_norm and train:
            out = self._trained(params, xt, t)[0]
        elif self.batch_norm and STATISTICS not in params:
            raise ValueError(
                "the parameters of a batch-normalized classifier need its statistics; see Classifier.moments"
            )
        else:
            variables = {"params": params["net"], STATISTICS: params.get(STATISTICS, {})}
            out = self.net.apply(variables, *self._inputs(xt, t))  # type: ignore[assignment]
        if "temperature" not in params:
            return out.astype(jnp.float32)
        found = params["temperature"]
        log_temperature = jnp.interp(self._log_level(t), found["log_level"], found["log_temperature"])
        return out.astype(jnp.float32) * jnp.exp(-log_temperature)[:, None]

    def log_prob(self, params: Params, xt: Array, t: Array, label: Array) -> Array:
        """log p(label | xt) [B] of classes `label` int [B]; other arguments as of `logits`."""
        every = jax.nn.log_softmax(self.logits(params, xt, t))
        return jnp.take_along_axis(every, label[:, None], axis=1)[:, 0]

    def moments(self, params: Params, xt: Array, t: Array) -> Params:
        """Mean and variance of this batch at every batch normalization; `pooled` makes the statistics of many."""
        return self._trained(params, xt, t)[1][STATISTICS]

    def _trained(self, params: Params, xt: Array, t: Array) -> tuple[Array, Any]:
        return self.net.apply(
            {"params": params["net"]}, *self._inputs(xt, t), train=True, mutable=[STATISTICS]
        )

    def _inputs(self, xt: Array, t: Array) -> tuple[Array, Array]:
        """What the network sees: the image at unit variance [B,H,W,C], and the noise level's number [B]."""
        if not self.timed:
            return xt / self.sigma_data, jnp.zeros_like(t)
        scale = jnp.sqrt(self.process.sigma(t) ** 2 + (self.process.alpha(t) * self.sigma_data) ** 2)
        return xt / bcast(scale, xt), self._log_level(t) / 4

    def _log_level(self, t: Array) -> Array:
        """ln(sigma / alpha) [B], finite at both ends of time."""
        sigma, alpha = self.process.sigma(t), self.process.alpha(t)
        return jnp.log(jnp.maximum(sigma, 1e-20)) - jnp.log(jnp.maximum(alpha, 1e-20))


def pooled(moments: Sequence[Params]) -> Params:
    """Statistics of all images from the `moments` of equally large batches ("precise", arXiv 2105.07576, section 3).

    A layer's variance is the mean of the batches' variances plus the variance of their means.
    """

    def one(*each: Mapping[str, Array]) -> dict[str, Array]:
        means, variances = (jnp.stack([part[name] for part in each]) for name in ("mean", "var"))
        return {"mean": means.mean(0), "var": variances.mean(0) + means.var(0)}

    return jax.tree.map(one, *moments, is_leaf=lambda node: isinstance(node, Mapping) and "var" in node)


def temperatures(levels: Sequence[float], values: Sequence[float]) -> Params:
    """The `temperature` of a classifier's parameters: `values` at noise levels `levels`, rising.

    Between two levels ln T is linear in ln sigma, and beyond the ends it is constant.
    """
    return {
        "log_level": jnp.asarray(np.log(levels), jnp.float32),
        "log_temperature": jnp.asarray(np.log(values), jnp.float32),
    }


def make_classifier(
    cfg: side.Classifier,
    process: GaussianProcess,
    shape: tuple[int, int, int],
    classes: int,
    sigma_data: float,
) -> Classifier:
    """The classifier a config describes, for images of `shape` (H, W, C) and `classes` classes.

    Raises:
      UserError: a field is out of range or does not fit the images.
    """
    check(cfg, shape, classes)
    if cfg.arch == "resnet":
        net: nn.Module = TimedResNet(classes, cfg.width, cfg.blocks, cfg.norm, cfg.timed)
    else:
        net = HalfUNet(classes, cfg.width, cfg.blocks, cfg.timed)
    return Classifier(net, process, sigma_data, shape, classes, cfg.timed, cfg.norm == "batch")


def check(cfg: side.Classifier, shape: tuple[int, int, int], classes: int) -> None:
    """Raises UserError when no such network can be made."""
    if classes < 2:
        raise UserError(
            f"classifier: {classes} classes, but it takes two to tell apart; raise surrogate.clusters or lower "
            "surrogate.cohesion"
        )
    if cfg.width < 4 or cfg.width % 4:
        raise UserError(f"classifier.width = {cfg.width}: must be a positive multiple of 4")
    if not cfg.blocks or min(cfg.blocks) < 1:
        raise UserError(
            f"classifier.blocks = {cfg.blocks}: give one stage or more, each of 1 block or more, such as 2 2 2"
        )
    if cfg.arch == "half_unet" and cfg.norm == "batch":
        raise UserError(
            "classifier.norm = 'batch': half_unet has group norms; set it to group, or arch to resnet"
        )
    factor = 2 ** (len(cfg.blocks) - 1)
    if any(side % factor for side in shape[:2]):
        most = min(side & -side for side in shape[:2]).bit_length()
        raise UserError(
            f"classifier.blocks = {cfg.blocks}: {len(cfg.blocks)} stages need sides that are multiples of {factor}, "
            f"the images have {shape[0]}x{shape[1]}; give {most} stages or fewer"
        )
