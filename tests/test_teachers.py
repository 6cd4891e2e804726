"""Teachers: Bayes' posterior from exact denoisers, checks of foreign functions, and the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evidence_helper import SHAPE, drawn, tiny_model
from scipy.special import softmax
from scipy.stats import multivariate_normal

from mdiff import config
from mdiff.errors import UserError
from mdiff.probes import gap
from mdiff.probes.divergence import make_levels
from mdiff.process.gaussian import bcast
from mdiff.process.laws import make_process
from mdiff.recipes import teachers

RNG = np.random.default_rng(0)
MEANS = RNG.normal(size=(3, 4)) * 0.4
COVS = [
    s**2 * np.eye(4) + 0.05 * np.outer(v, v)
    for s, v in zip((0.3, 0.4, 0.5), RNG.normal(size=(3, 4)), strict=True)
]


def class_denoiser(process):
    """Exact E[x0 | xt, class] of three normal laws of 2x2 images; the condition is one-hot."""
    values, vectors = (
        jnp.asarray(np.stack(a), jnp.float32) for a in zip(*map(np.linalg.eigh, COVS), strict=True)
    )
    means = jnp.asarray(MEANS, jnp.float32)

    def denoiser(xt, t, cond):
        level = process.noise_level(t)
        x = (xt / bcast(process.alpha(t), xt)).reshape(len(xt), 1, 4) - means  # [B,K,4]
        along = jnp.einsum("kij,bki->bkj", vectors, x)
        shrunk = along * values / (values + level[:, None, None] ** 2)
        every = means + jnp.einsum("kij,bkj->bki", vectors, shrunk)
        return process.from_x0(xt, jnp.einsum("bk,bki->bi", cond, every).reshape(xt.shape), t)

    return denoiser


def bayes(x):
    logs = [multivariate_normal(m, c).logpdf(x.reshape(len(x), 4)) for m, c in zip(MEANS, COVS, strict=True)]
    return softmax(np.stack(logs, axis=1), axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def posterior_errors(x0, kind, draws, seed):
    process = make_process(config.Process(kind=kind, sigma_min=0.01))
    levels = make_levels(0.01, 80, 40)
    return teachers.class_errors(
        process, class_denoiser(process), jnp.eye(3), x0, levels, draws=draws, seed=seed
    )


@pytest.fixture(scope="module")
def images():
    which = np.arange(60) % 3
    rng = np.random.default_rng(5)
    rows = [rng.multivariate_normal(MEANS[k], COVS[k]) for k in which]
    return np.float32(rows).reshape(60, 2, 2, 1), which


@pytest.mark.parametrize("kind", ["ve", "vp_cosine"])
def test_exact_denoisers_give_bayes_posterior(images, kind):
    x0, _ = images
    found = softmax(-np.asarray(posterior_errors(x0, kind, 300, 0)), axis=1)
    truth = bayes(x0)
    np.testing.assert_allclose(found, truth, atol=0.12)
    assert np.abs(found - truth).mean() < 0.02
    sure = np.sort(truth, axis=1)[:, 2] > 0.6
    assert sure.sum() > 20 and (found.argmax(1) == truth.argmax(1))[sure].all()


def test_few_draws_still_rank_the_classes(images):
    x0, which = images
    found = np.asarray(posterior_errors(x0, "ve", 8, 1)).argmin(1)
    best = np.mean(bayes(x0).argmax(1) == which)
    assert np.mean(found == which) > best - 0.1 > 0.5


def test_an_image_is_judged_alone(images):
    x0 = images[0]
    whole = np.asarray(posterior_errors(x0, "ve", 8, 1))
    np.testing.assert_allclose(
        np.asarray(posterior_errors(x0[::-1][:7], "ve", 8, 1)), whole[::-1][:7], atol=1e-3
    )


# ------------------------------------------------------------------------------------- of a model


def test_a_model_classifies_by_its_errors():
    """Against the same sum in float64 numpy, with the noise the errors were measured with."""
    model = tiny_model(classes=3)
    params = drawn(model, 0.6)
    levels = (0.3, 0.6, 1.2)
    teach = teachers.diffusion_classifier(model, params, levels, draws=2, seed=4)
    x = np.random.default_rng(1).integers(0, 256, (66, *SHAPE), np.uint8)
    found = teach(x)
    assert found.shape == (66, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(teach(x[::-1]), found[::-1], atol=1e-6)

    denoise = jax.jit(
        lambda xt, t, label: model.denoiser(params)(xt, t, model.condition(params, {"label": label})).x0
    )
    noise = [
        np.asarray(jax.jit(gap.fixed_noise, static_argnums=3)(4, d, np.zeros(1, int), SHAPE)) for d in (0, 1)
    ]
    x0, shares = x[-2:] / 127.5 - 1, np.log(2) * np.array([0.5, 1, 0.5])  # trapezoid rule in ln sigma
    total = np.zeros((2, 3))
    for level, share in zip(levels, shares, strict=True):
        t = np.full(2, model.process.time(np.float32(level)))
        for k in range(3):
            wrong = [np.asarray(denoise(np.float32(x0 + level * n), t, np.full(2, k))) - x0 for n in noise]
            total[:, k] += share / level**2 * np.mean([np.sum(w**2, axis=(1, 2, 3)) for w in wrong], axis=0)
    np.testing.assert_allclose(found[-2:], softmax(-total, axis=1), rtol=2e-3, atol=1e-5)
    softer = teachers.diffusion_classifier(model, params, levels, draws=2, seed=4, temperature=10.0)(x[-2:])
    np.testing.assert_allclose(softer, softmax(-total / 10, axis=1), rtol=2e-3)


def test_models_that_cannot_classify():
    for model, fields, words in (
        (tiny_model(), {}, "net.classes = 0"),
        (tiny_model(classes=2), {"draws": 0}, "draws = 0"),
        (tiny_model(classes=2), {"temperature": 0.0}, "temperature = 0"),
        (tiny_model(classes=2), {"levels": (1.0,)}, "levels"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            teachers.diffusion_classifier(model, {}, **{"levels": (0.1, 1.0), **fields})
        assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------- other teachers

X = np.random.default_rng(2).integers(0, 256, (5, *SHAPE), np.uint8)


def test_functions_are_passed_on():
    answers = np.array([[0.2, 0.8]] * 5)
    np.testing.assert_allclose(teachers.of_function(lambda x: answers)(X), answers, rtol=1e-6)
    as_logits = teachers.of_function(lambda x: jnp.asarray(np.log(answers) + 3), logits=True, classes=2)
    np.testing.assert_allclose(as_logits(X), answers, rtol=1e-5)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (np.ones(5), "shape"),
        (np.ones((4, 2)) / 2, "shape"),
        (np.ones((5, 3)) / 3, "2"),
        (np.full((5, 2), np.nan), "not finite"),
        (np.array([[3.0, -2.0]] * 5), "logits=True"),
        (np.full((5, 2), 0.4), "logits=True"),
    ],
)
def test_answers_that_are_no_probabilities(answers, words):
    with pytest.raises(UserError, match=words) as caught:
        teachers.of_function(lambda x: answers, classes=2)(X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["logistic", "mlp"])
def test_the_oracle_learns_what_can_be_seen(kind):
    rng = np.random.default_rng(3)

    def draw(n):
        labels = np.arange(n) % 3
        flat = rng.normal(100, 20, (n, 16))
        flat[np.arange(n), 5 * labels] += 120
        return np.clip(flat, 0, 255).astype(np.uint8).reshape(n, *SHAPE), np.array([0, 1, 3])[labels]

    teach = teachers.oracle(*draw(240), classes=5, kind=kind)
    images, labels = draw(120)
    found = teach(images)
    assert found.shape == (120, 5) and (found[:, [2, 4]] == 0).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert np.mean(found.argmax(1) == labels) > 0.95


def test_bad_images_and_labels():
    labels = np.array([0, 1, 0, 1, 1])
    teach = teachers.oracle(X, labels)
    for call, words in (
        (lambda: teach(X.astype(np.float32)), "uint8"),
        (lambda: teach(X[:, :3]), "3x4x1"),
        (lambda: teachers.oracle(X, labels[:4]), "labels"),
        (lambda: teachers.oracle(X, labels, classes=1), "give 0 to 0"),
        (lambda: teachers.oracle(X, labels * 0), "two or more"),
        (lambda: teachers.oracle(X, labels, kind="tree"), "'tree'"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
