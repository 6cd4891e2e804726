"""What a model answers, for the probes that ask where memories sit: detectors, returns, divergence, implicit labels.

Each function runs one compiled program over batches of images and gives arrays; `probes.detectors`, `probes.returns`,
`probes.divergence` and `probes.implicit` make results of them. All noise is that of `probes.gap.fixed_noise`: of draw
and image id alone, so that models, levels and controls are compared under the same noise.

A model with classes is asked for each image's own label, or without one where it has none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from mdiff import config
from mdiff.data.source import Images
from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.nets import closed_form
from mdiff.nets.denoiser import Model, from_sigma_fn
from mdiff.nets.dit import DiT
from mdiff.probes import detectors, gap
from mdiff.process.gaussian import GaussianProcess, bcast
from mdiff.process.times import make_grid
from mdiff.recipes import answers
from mdiff.sample import sampler
from mdiff.sample.steps import METHODS
from mdiff.types import Array, Denoiser, Params, to_float, to_uint8

BATCH = 64
"""Images per call of a network."""
DETERMINISTIC = ("heun", "euler", "ddim", "dpmpp2m")
"""Samplers without noise of their own (with churn and eta 0)."""


def images_of(x: np.ndarray, label: np.ndarray | None = None) -> Images:
    """Generations uint8 [N,H,W,C] as a set of images with ids 0..N-1."""
    x = np.asarray(x)
    if x.ndim != 4 or x.dtype != np.uint8:
        raise UserError(f"images: {x.dtype} of shape {x.shape}; give uint8 [N,H,W,C]")
    return Images("generated", x, np.arange(len(x), dtype=np.int32), label)


# ------------------------------------------------------------------------------------- detectors


def detector_rows(
    model: Model,
    params: Params,
    images: Images,
    levels: tuple[float, ...],
    *,
    draws: int = 2,
    probes: int = 0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Score norm, local dimension and denoising error of images; training images are not used.

    Args:
      model: the network; its convolutions are taken in the form that allows forward mode, whatever `net.scan_safe`.
      params: its parameters.
      images: N generations (`images_of`).
      levels: L noise levels (EDM's sigma).
      draws: of noise per image and level, for score_norm and error.
      probes: random sign vectors per image that estimate the trace of the denoiser's Jacobian (Hutchinson 1990); 0 takes all
        H W C directions, exactly.
      seed: of the noise and the sign vectors.

    Returns:
      float32 [L,N] each: `score_norm`, `flipd`, `error` (see `probes.detectors`).

    Raises:
      UserError: levels, draws or probes out of range, or a model of damaged images.
    """
    _check(model, images, levels)
    if draws < 1 or probes < 0:
        raise UserError(
            f"draws = {draws}, probes = {probes}: need 1 draw or more, and 0 probes (exact) or more"
        )
    program = _detector_program(_forward_mode(model), tuple(levels), draws, probes, seed)
    return _over_batches(functools.partial(program, params), images)


@functools.lru_cache(maxsize=8)
def _detector_program(
    model: Model, levels: tuple[float, ...], draws: int, probes: int, seed: int
) -> Callable[[Params, dict[str, Array]], dict[str, Array]]:
    @jax.jit
    def program(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
        x, ids, cond = _opened(model, params, batch)
        denoiser = model.denoiser(params)

        def one(sigma: Array) -> dict[str, Array]:
            def answer(u: Array) -> Array:
                return _at_unit_scale(model.process, denoiser, u, sigma, cond)

            def noisy(draw: Array) -> tuple[Array, Array]:
                u = x + sigma * gap.fixed_noise(seed, draw, ids, x.shape[1:])
                found = answer(u)
                return jnp.sqrt(_squared(u - found)) / sigma, _squared(found - x) / x[0].size

            norm, error = jax.lax.map(noisy, jnp.arange(draws))
            dimension = detectors.local_dimension(answer, x, sigma, probes, keys(seed, "trace", ids))
            return {"score_norm": norm.mean(0), "flipd": dimension, "error": error.mean(0)}

        return jax.lax.map(one, jnp.asarray(levels, jnp.float32))

    return program


# --------------------------------------------------------------------------------------- returns


def noised_and_denoised(
    model: Model,
    params: Params,
    images: Images,
    levels: tuple[float, ...],
    cfg: config.Sample,
    *,
    seed: int = 0,
) -> np.ndarray:
    """What images become when noise of each level is added and removed by the model alone, without guidance.

    Args:
      model: the network.
      params: its parameters.
      images: N of them; one noise per image, scaled to each level.
      levels: L noise levels (EDM's sigma), each above that at which sampling ends.
      cfg: a deterministic sampler; its steps are spread over the noise levels from the image's down.
      seed: of the noise.

    Returns:
      uint8 [L,N,H,W,C].

    Raises:
      UserError: the sampler adds noise, a level is at or below its last one, or a model of damaged images.
    """
    _check(model, images, levels)
    sampler.check(cfg)
    if cfg.method not in DETERMINISTIC or cfg.churn > 0 or cfg.eta > 0:
        raise UserError(
            f"sample.method = {cfg.method!r}, churn {cfg.churn:g}, eta {cfg.eta:g}: adds noise of its own; take one of "
            f"{', '.join(DETERMINISTIC)} with churn and eta 0"
        )
    lowest = max(model.process.sigma_min, cfg.until or 0.0)
    if min(levels) <= lowest:
        raise UserError(f"levels: {min(levels):g} is not above {lowest:g}, where sampling ends; leave it out")
    program, back = _return_program(model, cfg, seed), []
    for level in levels:
        grid = make_grid(model.process, cfg.grid, cfg.steps, lowest, level, model.process.rho)
        found = _over_batches(functools.partial(program, params, grid), images, axis=0)
        back.append(to_uint8(found["back"]))
    return np.stack(back)


@functools.lru_cache(maxsize=8)
def _return_program(model: Model, cfg: config.Sample, seed: int) -> Callable[..., dict[str, Array]]:
    """Jitted `(params, times [steps + 1], batch) -> {back}`; one program for all levels."""
    step = METHODS[cfg.method](model.process, cfg)

    @jax.jit
    def program(params: Params, times: Array, batch: dict[str, Array]) -> dict[str, Array]:
        x, ids, cond = _opened(model, params, batch)
        noise = gap.fixed_noise(seed, 0, ids, x.shape[1:])
        u = x + model.process.noise_level(times[0]) * noise
        return {
            "back": sampler.descend(model.denoiser(params), step, u, times, keys(seed, "return", ids), cond)
        }

    return program


# ------------------------------------------------------------------------------------ divergence


def elbo_errors(
    model: Model, params: Params, images: Images, levels: tuple[float, ...], *, draws: int = 2, seed: int = 0
) -> np.ndarray:
    """float64 [L,N] ||D(x + sigma n) - x||^2, summed over pixels, means over draws: what `probes.divergence.delta_m` takes.

    Two models asked with one seed see the same noise.
    """
    rows = answers.answer_rows(model, params, images, tuple(levels), draws, seed)
    return np.asarray(rows["error"], np.float64) * math.prod(model.shape)


def optimum_errors(
    model: Model, params: Params, images: Images, levels: tuple[float, ...], *, draws: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """How far a denoiser is from the empirical one at noisy training images.

    Args:
      model: the network.
      params: its parameters.
      images: the N training images: all that it was trained on, planted copies included.
      levels: L noise levels.
      draws: of noise per image and level.
      seed: of the noise.

    Returns:
      ||D - D*||^2 and ||D_mean - D*||^2, D_mean the mean image; float64 [L,N], summed over pixels, means over draws: what
      `probes.divergence.optimum` takes.
    """
    _check(model, images, levels)
    program = _optimum_program(model, tuple(levels), draws, seed)
    points = jnp.asarray(to_float(np.asarray(images.x)))
    found = _over_batches(lambda batch: program(params, batch, points), images)
    return np.asarray(found["apart"], np.float64), np.asarray(found["scale"], np.float64)


@functools.lru_cache(maxsize=8)
def _optimum_program(
    model: Model, levels: tuple[float, ...], draws: int, seed: int
) -> Callable[..., dict[str, Array]]:
    @jax.jit
    def program(params: Params, batch: dict[str, Array], points: Array) -> dict[str, Array]:
        x, ids, cond = _opened(model, params, batch)
        denoiser = model.denoiser(params)
        best = from_sigma_fn(closed_form.empirical(points), model.process)  # type: ignore[arg-type]

        def one(at: tuple[Array, Array]) -> dict[str, Array]:
            u = x + at[0] * gap.fixed_noise(seed, at[1], ids, x.shape[1:])
            optimal = _at_unit_scale(model.process, best, u, at[0], None)
            found = _at_unit_scale(model.process, denoiser, u, at[0], cond)
            return {"apart": _squared(found - optimal), "scale": _squared(points.mean(0) - optimal)}

        sigma = jnp.repeat(jnp.asarray(levels, jnp.float32), draws)
        every = jax.lax.map(one, (sigma, jnp.tile(jnp.arange(draws), len(levels))))
        return jax.tree.map(lambda leaf: leaf.reshape(len(levels), draws, -1).mean(1), every)

    return program


# ------------------------------------------------------------------------------------- features


def features(
    model: Model, params: Params, images: Images, levels: tuple[float, ...], *, seed: int = 0, taps: str = ""
) -> np.ndarray:
    """A network's middle features of noisy images, means over positions.

    Args:
      model: the network.
      params: its parameters; of an untrained model as a control.
      images: N of them.
      levels: L noise levels (EDM's sigma) at which the network looks at them.
      seed: of the noise.
      taps: name of the activation, a glob pattern that matches one; "" is the last block at the lowest resolution of a
        U-Net ("mid*_1/out"), the middle block of a DiT.

    Returns:
      float32 [L,N,F].

    Raises:
      UserError: no activation, or more than one, has that name; or a model of damaged images.
    """
    _check(model, images, levels)
    program = _feature_program(model, tuple(levels), seed, taps)
    return np.asarray(_over_batches(functools.partial(program, params), images)["features"])


def noisy_pixels(model: Model, images: Images, levels: tuple[float, ...], *, seed: int = 0) -> np.ndarray:
    """float32 [L,N,D]: the pixels that `features` looks at, at unit signal scale; the control without a network."""
    _check(model, images, levels)

    @jax.jit
    def program(batch: dict[str, Array]) -> dict[str, Array]:
        x = jnp.asarray(to_float(batch["x"]))
        noise = gap.fixed_noise(seed, 0, batch["id"], x.shape[1:])
        return {"pixels": jnp.stack([(x + level * noise).reshape(len(x), -1) for level in levels])}

    return np.asarray(_over_batches(program, images)["pixels"])


@functools.lru_cache(maxsize=8)
def _feature_program(
    model: Model, levels: tuple[float, ...], seed: int, taps: str
) -> Callable[[Params, dict[str, Array]], dict[str, Array]]:
    deep = isinstance(model.net, DiT)
    name = taps or ("blocks/out" if deep else "mid*_1/out")

    @jax.jit
    def program(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
        x, ids, cond = _opened(model, params, batch)
        noise = gap.fixed_noise(seed, 0, ids, x.shape[1:])

        def one(sigma: Array) -> Array:
            t = jnp.full(len(x), model.process.time(sigma))
            u = x + sigma * noise
            _, found = model.apply(params, bcast(model.process.alpha(t), u) * u, t, cond, taps=(name,))
            if len(found) != 1:
                raise UserError(f"taps {name!r}: {len(found)} activations match; give the name of one")
            ((where, value),) = found.items()
            if deep and where.startswith("blocks/"):  # all blocks' in one array
                value = value[len(value) // 2]
            return jnp.mean(value.astype(jnp.float32).reshape(len(x), -1, value.shape[-1]), axis=1)

        return {"features": jax.lax.map(one, jnp.asarray(levels, jnp.float32))}

    return program


@dataclass(frozen=True, eq=False)
class NetworkFeatures:
    """A model's own middle features as a feature space (`features.pixel.Features`): SIDE's `surrogate.features` network.

    Attributes:
      model: the network.
      params: its parameters.
      level: noise level (EDM's sigma) at which it looks at the images.
      seed: of the noise.
    """

    model: Model
    params: Params
    level: float
    seed: int = 0

    @property
    def name(self) -> str:
        """Such as "network@0.3"."""
        return f"network@{self.level:g}"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images [N,H,W,C], uint8 or float in [-1, 1], to float32 [N,F]."""
        x = np.asarray(images)
        given = images_of(x if x.dtype == np.uint8 else to_uint8(x))
        # One noise for all images: an image's features do not depend on its place in the batch.
        alike = replace(given, id=np.zeros(len(x), np.int32))
        return features(self.model, self.params, alike, (self.level,), seed=self.seed)[0]


# -------------------------------------------------------------------------------------- in common


def _opened(model: Model, params: Params, batch: dict[str, Array]) -> tuple[Array, Array, Array | None]:
    """Clean images [N,H,W,C], ids [N] and the condition of a batch."""
    entries = {name: column for name, column in batch.items() if name not in ("x", "id")}
    return (
        jnp.asarray(to_float(batch["x"])),
        batch["id"],
        model.condition(params, entries, n=len(batch["id"])),
    )


def _at_unit_scale(
    process: GaussianProcess, denoiser: Denoiser, u: Array, sigma: Array, cond: Array | None
) -> Array:
    """D(u; sigma) of u = xt / alpha [N,H,W,C]."""
    t = jnp.full(len(u), process.time(sigma))
    return denoiser(bcast(process.alpha(t), u) * u, t, cond).x0


def _squared(x: Array) -> Array:
    return jnp.sum(x**2, axis=(1, 2, 3))


def _over_batches(
    program: Callable[[dict[str, np.ndarray]], dict[str, Array]], images: Images, axis: int = 1
) -> dict[str, np.ndarray]:
    """A program's arrays for all images, joined along the axis that counts images."""
    named = {
        "x": images.x,
        "id": images.id,
        "label": images.label,
        "vector": images.vector,
        "tokens": images.tokens,
    }
    columns = {name: np.asarray(column) for name, column in named.items() if column is not None}
    found = []
    for start in range(0, len(images), BATCH):
        # One size for all batches; what the last one is filled up with is not read.
        part = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
        answer = program({name: column[part] for name, column in columns.items()})
        found.append({name: np.asarray(value) for name, value in answer.items()})
    joined = {name: np.concatenate([part[name] for part in found], axis=axis) for name in found[0]}
    return {name: np.take(value, np.arange(len(images)), axis=axis) for name, value in joined.items()}


def _forward_mode(model: Model) -> Model:
    """The same model with convolutions that have a forward derivative; parameters are the same."""
    cfg = getattr(model.net, "cfg", None)
    if cfg is None or not cfg.scan_safe:
        return model
    return replace(model, net=model.net.clone(cfg=replace(cfg, scan_safe=False)))


def _check(model: Model, images: Images, levels: tuple[float, ...]) -> None:
    if model.damage is not None:
        raise UserError(
            "data.degrade: the model was trained on damaged images; these measures need whole ones"
        )
    if not len(images):
        raise UserError("images: none given; give at least one")
    if images.x.shape[1:] != model.shape:
        ours, theirs = ("x".join(map(str, shape)) for shape in (images.x.shape[1:], model.shape))
        raise UserError(f"images: are {ours}, the model's are {theirs}; resize them")
    if not levels or not all(0 < level < math.inf for level in levels):
        raise UserError(f"levels: {list(levels)}; give noise levels above 0, and finite")
