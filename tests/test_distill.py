"""Distillation, against closed forms: two Gaussians whose class probabilities are known at every noise level."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, log_expit
from scipy.stats import entropy

from mdiff import config, side
from mdiff.nets.classifier import Classifier
from mdiff.objectives import distill
from mdiff.process.laws import make_process
from mdiff.train import state

PROCESS = config.Process()
VE = make_process(PROCESS)


class Fixed(nn.Module):
    """Logits that are parameters, whatever the image."""

    classes: int

    @nn.compact
    def __call__(self, x, c_noise, train=False):
        return jnp.tile(self.param("logits", nn.initializers.zeros, (self.classes,)), (len(x), 1))


class Linear(nn.Module):
    """Logits linear in the image and in the level."""

    classes: int

    @nn.compact
    def __call__(self, x, c_noise, train=False):
        return nn.Dense(self.classes)(jnp.concatenate([x.reshape(len(x), -1), c_noise[:, None]], axis=1))


class Perceptron(nn.Module):
    """Two hidden layers over the pixels and features of the level."""

    classes: int

    @nn.compact
    def __call__(self, x, c_noise, train=False):
        told = jnp.stack([c_noise, jnp.cos(2 * c_noise), jnp.sin(2 * c_noise)], axis=1)
        h = jnp.concatenate([x.reshape(len(x), -1), told], axis=1)
        for _ in range(2):
            h = nn.gelu(nn.Dense(48)(h))
        return nn.Dense(self.classes)(h)


def fixed(logits) -> tuple[Classifier, dict]:
    found = Classifier(Fixed(len(logits)), VE, 0.5, (2, 2, 1), len(logits))
    return found, {"net": {"logits": jnp.asarray(logits, jnp.float32)}}


TEACHER = np.array([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9], [1.0, 0.0, 0.0]], np.float32)
STUDENT = np.log([0.5, 0.3, 0.2])


def batch(teacher=TEACHER, seed: int = 0):
    x = np.random.default_rng(seed).normal(size=(len(teacher), 2, 2, 1))
    return {"x": jnp.asarray(x, jnp.float32), "vector": jnp.asarray(teacher)}


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_loss_is_scipys_divergence(loss):
    """KL(teacher || student), not the other way round; the cross-entropy is more by the teacher's entropy."""
    found, params = fixed(STUDENT)
    objective = distill.make(found, side.Classifier(loss=loss), PROCESS)
    value, aux = objective(params, jax.random.key(0), batch())
    expected = np.array([entropy(row, np.exp(STUDENT)) for row in TEACHER])
    if loss == "ce":
        expected += np.array([entropy(row) for row in TEACHER])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(aux["accuracy"], [1, 0, 1])


def test_both_losses_have_one_gradient():
    found, params = fixed(STUDENT)

    def gradient(loss):
        objective = distill.make(found, side.Classifier(loss=loss), PROCESS)
        return jax.grad(lambda p: objective(p, jax.random.key(0), batch())[0].mean())(params)["net"]["logits"]

    assert np.isfinite(gradient("kl")).all()  # also where the teacher is certain
    np.testing.assert_allclose(gradient("kl"), gradient("ce"), atol=1e-7)
    np.testing.assert_allclose(gradient("kl"), np.exp(STUDENT) - TEACHER.mean(0), atol=1e-6)


@pytest.mark.parametrize("levels", ["uniform", "logsnr"])
def test_noise_levels_follow_the_law(levels):
    found, params = fixed([0.0, 0.0])
    objective = distill.make(found, side.Classifier(levels=levels), PROCESS)
    sigma = objective(params, jax.random.key(1), batch(np.full((4000, 2), 0.5, np.float32)))[1]["sigma"]
    coordinate = np.asarray(sigma) ** (1 / 7) if levels == "uniform" else np.log(sigma)
    low, high = (0.002 ** (1 / 7), 80 ** (1 / 7)) if levels == "uniform" else np.log([0.002, 80])
    inside = (coordinate - low) / (high - low)
    assert inside.min() >= 0 and inside.max() <= 1.00001
    np.testing.assert_allclose(np.quantile(inside, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03)


def test_without_time_all_images_are_clean():
    found, params = fixed([0.0, 0.0])
    objective = distill.make(found, side.Classifier(timed=False), PROCESS)
    sigma = objective(params, jax.random.key(1), batch(np.full((8, 2), 0.5, np.float32)))[1]["sigma"]
    np.testing.assert_allclose(sigma, PROCESS.sigma_min)


def test_accumulated_gradients_are_those_of_the_whole():
    """What the training step asks of an objective: draws apart from the loss."""
    found = Classifier(Linear(3), VE, 0.5, (2, 2, 1), 3)
    params = found.init(jax.random.key(0))
    objective = distill.make(found, side.Classifier(), PROCESS)
    many = batch(np.tile(TEACHER, (4, 1)))
    after = []
    for parts in (1, 3):
        cfg = config.Train(batch=12, accumulate=parts)
        sgd = optax.sgd(0.1)
        step = jax.jit(state.make_step(objective, sgd, lambda resident, rows, key: rows, cfg, 0, unroll=True))
        begin = state.TrainState(jnp.int32(0), params, params, sgd.init(params))
        after.append(step(begin, {}, many)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *after)


MEAN = np.array([[1.0, -0.5], [0.5, 0.25]])[..., None] * 0.5
SPREAD = 0.3


def exact_logit(xt: np.ndarray, alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """ln p(1 | xt) / p(0 | xt) for N(+MEAN, SPREAD^2) against N(-MEAN, SPREAD^2), equally likely: linear in xt."""
    return 2 * alpha * np.sum(xt * MEAN, (1, 2, 3)) / (alpha**2 * SPREAD**2 + sigma**2)


def draw(rng, n):
    sign = rng.choice([-1, 1], n)[:, None, None, None]
    return (sign * MEAN + SPREAD * rng.normal(size=(n, 2, 2, 1))).astype(np.float32)


def test_student_learns_the_posterior_at_every_noise_level():
    """Taught by p(c | x0) of clean images alone, the student comes to p(c | xt), which is E[p(c | x0) | xt]."""
    settings = config.Process(kind="flow")
    process = make_process(settings)
    cfg = side.Classifier(levels="logsnr")
    found = Classifier(Perceptron(2), process, 0.5, (2, 2, 1), 2)
    objective = distill.make(found, cfg, settings)
    params = jax.jit(found.init)(jax.random.key(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 2000))

    @jax.jit
    def step(params, opt_state, key, x, teacher):
        grad = jax.grad(lambda p: objective(p, key, {"x": x, "vector": teacher})[0].mean())(params)
        updates, opt_state = optimizer.update(grad, opt_state)
        return optax.apply_updates(params, updates), opt_state

    rng, opt_state = np.random.default_rng(0), optimizer.init(params)
    for i in range(2000):
        x = draw(rng, 512)
        p = expit(exact_logit(x, 1.0, 0.0))
        teacher = np.stack([1 - p, p], 1).astype(np.float32)
        params, opt_state = step(params, opt_state, jax.random.key(i), x, teacher)

    log_prob, grad = (
        jax.jit(f)
        for f in (found.log_prob, jax.grad(lambda p, x, t, c: found.log_prob(p, x, t, c).sum(), argnums=1))
    )
    ones = jnp.ones(2000, jnp.int32)
    for level in (0.02, 0.3, 0.8, 2.0, 8.0):
        t = jnp.full(2000, process.time(level))
        alpha, sigma = (np.asarray(rate(t), np.float64) for rate in (process.alpha, process.sigma))
        xt = process.corrupt(
            jnp.asarray(draw(rng, 2000)), rng.normal(size=(2000, 2, 2, 1)).astype(np.float32), t
        )
        logit = exact_logit(np.asarray(xt, np.float64), alpha, sigma)
        wrong = [
            np.asarray(log_prob(params, xt, t, c * ones)) - log_expit(s * logit) for c, s in ((1, 1), (0, -1))
        ]
        divergence = -np.mean(expit(logit) * wrong[0] + expit(-logit) * wrong[1])
        assert divergence < 0.005, (level, divergence)
        # And the guiding gradient, where the class is open: sigmoid(-logit) times that of the logit.
        if 0.5 <= level <= 2:
            slope = (2 * alpha / (alpha**2 * SPREAD**2 + sigma**2) * expit(-logit))[:, None] * MEAN.ravel()
            mine = np.asarray(grad(params, xt, t, ones), np.float64).reshape(2000, 4)
            cosine = np.sum(mine * slope) / np.sqrt(np.sum(mine**2) * np.sum(slope**2))
            assert cosine > 0.95, (level, cosine)
            assert 0.85 < np.sum(mine * slope) / np.sum(slope**2) < 1.15, level
