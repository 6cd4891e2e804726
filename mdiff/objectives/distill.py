"""Time-dependent knowledge distillation: a teacher of clean images taught to a student of noisy ones.

With the teacher's p(c | x0) and the student's q(c | xt, t), the loss is KL(p || q) or the cross-entropy KL(p || q) + H(p), at
every noise level (arXiv 2410.02467; earlier versions of it and arXiv 2406.12752 name the divergence). Both have one gradient.
The best student is E[p(c | x0) | xt], the class probabilities of a noisy image if the teacher's are those of a clean one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from mdiff import config, side
from mdiff.nets.classifier import Classifier
from mdiff.objectives.denoise import DrawnObjective, Draws, draw
from mdiff.process.times import make_times
from mdiff.types import Array, Batch, Key, Params


def make(classifier: Classifier, cfg: side.Classifier, process: config.Process) -> DrawnObjective:
    """The distillation objective: the teacher's probabilities [B,K] come as the batch's `vector`.

    `aux` holds each example's sigma [B] and accuracy [B]: 1 where student and teacher have one favourite class.
    A classifier that is not timed sees all images at sigma_min.

    Args:
      classifier: the student.
      cfg: uses loss, levels and timed.
      process: sigma_min and sigma_max.
    """
    times = make_times(config.Loss(times=cfg.levels), classifier.process, process)

    def drawn(key: Key, batch: Batch) -> Draws:
        draws = draw(key, batch["x"], times)
        return draws if cfg.timed else draws._replace(sigma=jnp.full_like(draws.sigma, process.sigma_min))

    def loss(params: Params, draws: Draws, batch: Batch) -> tuple[Array, dict[str, Array]]:
        teacher, t = batch["vector"], classifier.process.time(draws.sigma)
        xt = classifier.process.corrupt(batch["x"], draws.eps, t)
        logits = classifier.logits(params, xt, t, train=True)
        value = -jnp.sum(teacher * jax.nn.log_softmax(logits), axis=-1)
        if cfg.loss == "kl":
            value += jnp.sum(xlogy(teacher, teacher), axis=-1)
        hit = jnp.argmax(logits, axis=-1) == jnp.argmax(teacher, axis=-1)
        return value, {"sigma": draws.sigma, "accuracy": hit.astype(jnp.float32)}

    return DrawnObjective(drawn, loss)
