"""Teachers: what labels clean images for the time-dependent classifier to learn from (arXiv 2406.12752).

A teacher is a function of images, uint8 [N,H,W,C] -> float32 [N,K], each row the probabilities of K classes. Those made
here look at each image alone: neither its place nor its neighbours matter. Cluster labels are teachers too (`probes.clusters`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from mdiff.errors import UserError
from mdiff.features.pixel import flatten
from mdiff.nets.denoiser import Model
from mdiff.probes import gap
from mdiff.probes.divergence import weights
from mdiff.process.gaussian import GaussianProcess
from mdiff.types import Array, Denoiser, Params, to_float

Teacher: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""`uint8 [N,H,W,C] -> float32 [N,K]`, rows that sum to 1."""

BATCH = 64
"""Images per call of the network."""
NEAR_ONE = 1e-3
"""How far from 1 probabilities may sum before they are taken for something else."""


def class_errors(
    process: GaussianProcess,
    denoiser: Denoiser,
    conds: Array,
    x0: Array,
    levels: tuple[float, ...],
    *,
    draws: int = 1,
    seed: int = 0,
) -> Array:
    """The ELBO-weighted denoising error of images under each class; pure, to be traced.

    -log p(x | c) = int E||D(x + sigma n, c) - x||^2 / sigma^3 dsigma + a constant (`probes.divergence`), here by the trapezoid
    rule over the levels. All classes and all images see the same noise, so that classes differ by what they know alone, and
    an image's answer is a function of the image.

    Args:
      process: the noise law the denoiser was made for.
      denoiser: `(xt, t, cond) -> Prediction`.
      conds: [K,E], the condition of each class.
      x0: [N,H,W,C] clean images in [-1, 1].
      levels: L noise levels, rising.
      draws: of noise per level.
      seed: of the noise.

    Returns:
      float32 [N,K] in nats, up to a constant of each image.
    """
    weight = jnp.asarray(weights(levels), jnp.float32)
    ids = jnp.zeros(len(x0), jnp.int32)

    def one(cond: Array) -> Array:
        every = jnp.broadcast_to(cond, (len(x0), *cond.shape))
        return gap.errors(process, denoiser, x0, ids, levels, draws=draws, seed=seed, cond=every)

    errors = jax.lax.map(one, conds) * x0[0].size  # [K,L,N]
    # Less the mean over classes before the sum: at low noise the common part is large and its digits are wanted.
    errors -= errors.mean(0)
    return jnp.einsum("l,kln->nk", weight, errors, precision=jax.lax.Precision.HIGHEST)


def diffusion_classifier(
    model: Model,
    params: Params,
    levels: tuple[float, ...],
    draws: int = 4,
    seed: int = 0,
    temperature: float = 1.0,
) -> Teacher:
    """The diffusion model itself as a classifier: p(c | x) ~ p(x | c), by its errors (arXiv 2303.16203).

    Uniform prior; the ELBO's weights instead of that paper's equal ones, so that exact denoisers give Bayes' posterior.

    Args:
      model: with classes.
      params: its parameters.
      levels: noise levels (EDM's sigma), rising; the ELBO wants the whole range, a classifier the part where classes show.
      draws: of noise per level, the same for all classes and images.
      seed: of the noise.
      temperature: divides the nats: above 1 for softer labels.

    Raises:
      UserError: the model has no classes, or a setting is out of range.
    """
    classes = 0 if model.embedding is None else model.embedding.classes
    if not classes:
        raise UserError("net.classes = 0: a model without classes cannot classify; take another teacher")
    if model.damage is not None:
        raise UserError(
            "data.degrade: a model of damaged images cannot classify whole ones; take another teacher"
        )
    if draws < 1 or not 0 < temperature < math.inf:
        raise UserError(f"draws = {draws}, temperature = {temperature:g}: need 1 or more, and above 0")
    weights(levels)
    program = _classifier_program(model, tuple(levels), draws, seed)

    def teach(images: np.ndarray) -> np.ndarray:
        images = _checked(images, model.shape)
        found = []
        for start in range(0, len(images), BATCH):
            part = np.minimum(np.arange(start, start + BATCH), len(images) - 1)
            found.append(np.asarray(program(params, images[part]), np.float64))
        return softmax(-np.concatenate(found)[: len(images)] / temperature, axis=1).astype(np.float32)

    return teach


@functools.lru_cache(maxsize=8)
def _classifier_program(model: Model, levels: tuple[float, ...], draws: int, seed: int) -> Any:
    """Jitted `(params, images uint8 [N,H,W,C]) -> class errors [N,K]`."""
    classes = model.embedding.classes  # type: ignore[union-attr]

    @jax.jit
    def program(params: Params, images: Array) -> Array:
        conds = model.condition(params, {"label": jnp.arange(classes)}, n=classes)
        assert conds is not None
        x0: Array = to_float(images)  # type: ignore[assignment]
        return class_errors(model.process, model.denoiser(params), conds, x0, levels, draws=draws, seed=seed)

    return program


def of_function(
    fn: Callable[[np.ndarray], Any], *, logits: bool = False, classes: int | None = None
) -> Teacher:
    """Any function of clean images as a teacher, its answers checked at every call.

    Args:
      fn: uint8 [N,H,W,C] -> [N,K], of numpy, jax or torch on the CPU.
      logits: the answers are logits; softmax is taken.
      classes: K, if it must be a certain one.

    Returns:
      A teacher that raises UserError for answers of another shape, not finite, or no probabilities.
    """

    def teach(images: np.ndarray) -> np.ndarray:
        images = _checked(images)
        found = np.asarray(fn(images), np.float64)
        if found.ndim != 2 or len(found) != len(images) or found.shape[1] != (classes or found.shape[1]):
            wanted = f"[{len(images)}, {classes or 'classes'}]"
            raise UserError(f"teacher: answers of shape {found.shape} to {len(images)} images; give {wanted}")
        if not np.isfinite(found).all():
            raise UserError(
                f"teacher: {int(np.sum(~np.isfinite(found)))} answers are not finite; check the function"
            )
        if logits:
            return softmax(found, axis=1).astype(np.float32)
        sums = found.sum(1)
        if found.min() < -NEAR_ONE or np.abs(sums - 1).max() > NEAR_ONE:
            raise UserError(
                f"teacher: rows from {found.min():.3g} that sum to {sums.min():.3g}..{sums.max():.3g} are no "
                "probabilities; for logits set logits=True"
            )
        found = np.maximum(found, 0)
        return (found / found.sum(1, keepdims=True)).astype(np.float32)

    return teach


def oracle(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    classes: int | None = None,
    kind: Literal["logistic", "mlp"] = "logistic",
    seed: int = 0,
) -> Teacher:
    """A time-independent classifier trained on the real set: a reference, since no attacker has it.

    scikit-learn's, on pixels in [-1, 1]: multinomial logistic regression, or a perceptron with one hidden layer of 64 units.

    Args:
      images: uint8 [N,H,W,C], the training images.
      labels: int [N], from 0.
      classes: K, by default the largest label + 1; a class without images gets probability 0.
      kind: of classifier.
      seed: of the perceptron.

    Raises:
      UserError: labels do not go with the images or with `classes`, or all are one.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    images, labels = _checked(images), np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(
            f"labels: {labels.dtype} of shape {labels.shape} for {len(images)} images; give one integer each"
        )
    known = np.unique(labels)
    count = int(known[-1]) + 1 if classes is None else classes
    if known[0] < 0 or known[-1] >= count:
        raise UserError(f"labels: from {known[0]} to {known[-1]}; give 0 to {count - 1}")
    if len(known) < 2:
        raise UserError(f"labels: all are {known[0]}; a classifier needs two or more")
    if kind not in ("logistic", "mlp"):
        raise UserError(f"kind = {kind!r}: no such classifier; give logistic or mlp")
    fitted: Any = (
        LogisticRegression(max_iter=2000)
        if kind == "logistic"
        else MLPClassifier((64,), alpha=1e-2, max_iter=1000, random_state=seed)
    )
    fitted.fit(flatten(images), labels)
    shape = images.shape[1:]

    def teach(given: np.ndarray) -> np.ndarray:
        out = np.zeros((len(given), count), np.float32)
        out[:, known] = fitted.predict_proba(flatten(_checked(given, shape)))
        return out

    return teach


def _checked(images: np.ndarray, shape: tuple[int, ...] | None = None) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or not len(images) or images.dtype != np.uint8:
        raise UserError(
            f"images: {images.dtype} of shape {images.shape}; give uint8 [N,H,W,C] of one or more"
        )
    if shape is not None and images.shape[1:] != tuple(shape):
        ours, theirs = ("x".join(map(str, each)) for each in (images.shape[1:], shape))
        raise UserError(f"images: are {ours}, the teacher's are {theirs}; resize them")
    return images
