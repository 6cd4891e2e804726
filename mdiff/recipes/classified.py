"""What a classifier says of images at each noise level, and what that tells about the images it learned from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh as DeviceMesh
from scipy.special import log_softmax

from mdiff import config, side
from mdiff.data.stream import permutation
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.classifier import Classifier, pooled
from mdiff.objectives.denoise import DrawnObjective
from mdiff.probes.detectors import auroc
from mdiff.probes.gap import fixed_noise
from mdiff.train import mesh
from mdiff.types import Array, Estimate, Params, to_float

LEVELS = 12
"""Noise levels at which accuracy and temperature are measured."""
PASSES = 64
"""Batches that the statistics of batch normalization are averaged over, at most."""
ATTACKED = (0.05, 0.1, 0.2, 0.5, 1.0)
"""Noise levels at which membership is attacked: higher ones show little of an image, lower ones repeat each other."""


def noise_levels(process: config.Process) -> tuple[float, ...]:
    """`LEVELS` noise levels, spaced evenly in ln sigma from sigma_min to sigma_max."""
    return tuple(float(level) for level in np.geomspace(process.sigma_min, process.sigma_max, LEVELS))


def answers(
    classifier: Classifier,
    params: Params,
    images: np.ndarray,
    levels: Sequence[float],
    on: DeviceMesh | None = None,
    batch: int = 256,
    seed: int = 0,
) -> np.ndarray:
    """Logits of noisy images, each with its own noise that is the same at all levels.

    Args:
      classifier: the network.
      params: its parameters; with temperature, the logits are divided by it.
      images: uint8 [N,H,W,C].
      levels: L noise levels (EDM's sigma).
      on: devices the images are split over; None takes one.
      batch: images per call, before rounding to the devices.
      seed: of the noise.

    Returns:
      float32 [L,N,K], on every process.
    """
    on = mesh.make_mesh(config.Mesh(), jax.local_devices()[:1]) if on is None else on
    program, whole, n = _answer_program(classifier, on, seed), mesh.replicated(on), len(images)
    # Equal parts; what they are filled up with is not read.
    parts = -(-n // batch)
    size = -(-n // (parts * mesh.batch_devices(on))) * mesh.batch_devices(on)
    found = []
    for part in np.minimum(np.arange(parts * size), n - 1).reshape(parts, size):
        rows = mesh.place({"x": images[part], "id": part.astype(np.int32)}, whole)
        found.append([np.asarray(program(params, rows, np.float32(level))) for level in levels])
    return np.concatenate(found, axis=1)[:, :n]


@functools.lru_cache(maxsize=8)
def _answer_program(classifier: Classifier, on: DeviceMesh, seed: int) -> Any:
    """Jitted `(params, {x uint8 [B,H,W,C], id [B]}, sigma) -> logits [B,K]`, split over the devices by image."""

    @functools.partial(jax.jit, out_shardings=mesh.replicated(on))
    def program(params: Params, rows: dict[str, Array], sigma: Array) -> Array:
        rows = jax.lax.with_sharding_constraint(rows, mesh.batch_sharding(on))
        noise = fixed_noise(seed, 0, rows["id"], classifier.shape)
        t = jnp.full(len(noise), classifier.process.time(sigma))
        xt = classifier.process.corrupt(to_float(rows["x"]), noise, t)  # type: ignore[arg-type]
        with mesh.activations_on(on):
            return classifier.logits(params, xt, t)

    return program


def membership(
    classifier: Classifier,
    params: Params,
    members: np.ndarray,
    non_members: np.ndarray,
    levels: Sequence[float] = ATTACKED,
    confidence: float = 0.95,
) -> Estimate:
    """How well the classifier's confidence tells what it learned from: AUROC, 0.5 is not at all.

    The attacker has no labels: an image's score is ln max_c p(c | xt), averaged over noise levels (a confidence attack, as in
    arXiv 1806.01246, section V). The noise of image number i is the same on both sides.

    Args:
      classifier: the network.
      params: finished parameters.
      members: uint8 [M,H,W,C], whose score should be higher.
      non_members: uint8 [N,H,W,C].
      levels: noise levels (EDM's sigma).
      confidence: level of the interval (DeLong's variance, see `probes.detectors.auroc`).

    Raises:
      UserError: images are of another size than the classifier's, or a side has none.
    """
    scores = []
    for name, images in (("members", members), ("non-members", non_members)):
        if not len(images) or images.shape[1:] != classifier.shape:
            raise UserError(
                f"membership: the {name} are {images.shape}; give one image or more of shape {classifier.shape}"
            )
        every = answers(classifier, params, images, levels)
        scores.append(log_softmax(every, axis=-1).max(-1).mean(0))
    inside = np.arange(len(members) + len(non_members)) < len(members)
    return auroc(np.concatenate(scores), inside, confidence)


def make_statistics(
    classifier: Classifier,
    objective: DrawnObjective,
    images: np.ndarray,
    cfg: side.Classifier,
    on: DeviceMesh,
) -> Callable[[Params], Params]:
    """`params -> statistics` of batch normalization over images at all noise levels: at most `PASSES` batches of a pass.

    Args:
      classifier: the network.
      objective: draws the noise levels.
      images: uint8 [N,H,W,C] it is trained on.
      cfg: uses batch and seed.
      on: devices a batch is split over.
    """
    n, whole = len(images), mesh.replicated(on)
    rows = np.resize(permutation(cfg.seed, "statistics", 0, n), (min(PASSES, -(-n // cfg.batch)), cfg.batch))

    @functools.partial(jax.jit, out_shardings=whole)
    def program(params: Params, x: Array, number: Array) -> Params:
        x = jnp.asarray(to_float(jax.lax.with_sharding_constraint(x, mesh.batch_sharding(on))))
        draws = objective.draw(key(cfg.seed, "statistics", number), {"x": x})
        t = classifier.process.time(draws.sigma)
        with mesh.activations_on(on):
            return classifier.moments(params, classifier.process.corrupt(x, draws.eps, t), t)

    def statistics(params: Params) -> Params:
        return pooled([program(params, mesh.place(images[part], whole), i) for i, part in enumerate(rows)])

    return statistics
