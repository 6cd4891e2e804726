"""Detectors: dimensions known in closed form, and ROC numbers against brute force, scikit-learn and simulated coverage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evidence_helper import SHAPE, drawn, known_model, tiny_model
from scipy import stats
from sklearn.metrics import roc_auc_score

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.nets import closed_form
from mdiff.nets.denoiser import make_model
from mdiff.probes import detectors, gap
from mdiff.recipes import evidence
from mdiff.types import to_uint8

# ------------------------------------------------------------------------------- local dimension


def flat_law(d, k, seed=0):
    """A Gaussian on a k-dimensional subspace of R^d, spreads 0.5 to 2: (points [6,1,1,d] on it, sigma -> denoiser)."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(d, k)))[0]
    variances = np.linspace(0.5, 2, k) ** 2
    points = (rng.normal(size=(6, k)) * np.sqrt(variances)) @ basis.T

    def at(sigma):
        shrink = jnp.asarray((basis * (variances / (variances + sigma**2))) @ basis.T, jnp.float32)
        return lambda x: (x.reshape(len(x), -1) @ shrink).reshape(x.shape)

    return points.astype(np.float32)[:, None, None, :], at


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _dimension(answer, x, sigma, probes):
    return detectors.local_dimension(answer, x, jnp.float32(sigma), probes, keys(0, "t", jnp.arange(len(x))))


def dimension(answer, x, sigma, probes=0):
    return np.asarray(_dimension(answer, x, sigma, probes))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_dimension_of_a_flat_law(k):
    x, at = flat_law(12, k)
    np.testing.assert_allclose(dimension(at(0.01), x, 0.01), k, atol=0.02)


def test_the_dimension_is_the_slope_of_the_log_density():
    """d + d log p_sigma / d ln sigma, by finite differences of scipy's density in float64, at points on and off the set."""
    rng = np.random.default_rng(1)
    mix = rng.normal(size=(3, 3))
    cov = mix @ mix.T
    x, sigma = rng.normal(size=(5, 3)), 0.7

    def log_density(level):
        return stats.multivariate_normal(np.zeros(3), cov + level**2 * np.eye(3)).logpdf(x)

    step = 1e-4
    slope = (log_density(sigma * np.exp(step)) - log_density(sigma * np.exp(-step))) / (2 * step)
    gain = jnp.asarray(cov @ np.linalg.inv(cov + sigma**2 * np.eye(3)), jnp.float32)

    def answer(u):
        return (u.reshape(len(u), 3) @ gain.T).reshape(u.shape)

    found = dimension(answer, x.astype(np.float32).reshape(5, 1, 1, 3), sigma)
    np.testing.assert_allclose(found, 3 + slope, rtol=1e-4)


def test_noise_would_hide_the_dimension():
    """At x + sigma n the sum is the full dimension on average: why the image is asked as it is."""
    x, at = flat_law(12, 3)
    noisy = np.repeat(x, 300, axis=0) + 0.01 * np.random.default_rng(2).normal(size=(1800, 1, 1, 12))
    found = dimension(at(0.01), noisy.astype(np.float32), 0.01)
    assert found.mean() == pytest.approx(12, abs=0.5)


def test_the_trace_by_sign_vectors():
    x, at = flat_law(12, 3)
    exact, guessed = dimension(at(0.1), x, 0.1), dimension(at(0.1), x, 0.1, probes=4000)
    np.testing.assert_allclose(guessed, exact, atol=0.15)
    assert len(np.unique(dimension(at(0.1), x, 0.1, probes=2))) == 6  # each image has vectors of its own
    # Of a diagonal Jacobian a single sign vector gives the trace exactly.
    assert dimension(lambda u: 0.5 * u, x * 0, 1.0, probes=1) == pytest.approx(6)


# --------------------------------------------------------------------------------------- models


NET = config.Net(channels=16, mults=(1,), blocks=1, attention=(), scan_safe=True)
CONFIG = config.Config(data=config.Data(size=4), net=NET)


@pytest.fixture(scope="module")
def images():
    return evidence.images_of(np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8))


@pytest.mark.parametrize("kind", ["unet", "vp_cosine"])
def test_rows_of_a_network(images, kind):
    """The trace against finite differences; the rest against the denoiser asked once more."""
    model = make_model(CONFIG, 1) if kind == "unet" else tiny_model(kind)
    params = drawn(model)
    level = 0.8
    rows = evidence.detector_rows(model, params, images, (0.3, level), draws=3)
    assert {name: value.shape for name, value in rows.items()} == dict.fromkeys(
        ("score_norm", "flipd", "error"), (2, 3)
    )

    @jax.jit
    def answer(u):
        t = jnp.full(len(u), model.process.time(jnp.float32(level)))
        return model.denoiser(params)(model.process.alpha(t)[:, None, None, None] * u, t, None).x0

    x = images.x[0].astype(np.float32) / 127.5 - 1
    steps = 0.05 * np.eye(16, dtype=np.float32).reshape(16, 4, 4, 1)
    ends = np.asarray(answer(np.concatenate([x + steps, x - steps]))).reshape(2, 16, 16)
    trace = np.trace((ends[0] - ends[1]) / 0.1)
    still = np.asarray(answer(x[None]))[0]
    assert rows["flipd"][1, 0] == pytest.approx(trace + np.sum((still - x) ** 2) / level**2, rel=2e-3)
    noise = [
        np.asarray(jax.jit(gap.fixed_noise, static_argnums=3)(0, d, images.id, (4, 4, 1)))[0]
        for d in range(3)
    ]
    noisy = np.stack([x + level * n for n in noise])
    found = np.asarray(answer(noisy))
    norms = np.sqrt(np.sum((noisy - found) ** 2, axis=(1, 2, 3))) / level
    assert rows["score_norm"][1, 0] == pytest.approx(norms.mean(), rel=1e-4)
    assert rows["error"][1, 0] == pytest.approx(np.mean((found - x) ** 2), rel=1e-4)


def test_copies_are_found_where_memorization_is_planted():
    """Half of the law is ten images, half a normal law: all three detectors tell which half a sample is of."""
    rng = np.random.default_rng(0)
    train = rng.normal(0, 0.35, (10, *SHAPE)).clip(-1, 1)
    law = closed_form.mixture(np.concatenate([train] * 3).astype(np.float32), 0.5, ridge=0.05)
    copies = np.arange(60) < 30
    spread = np.cov(np.concatenate([train] * 3).reshape(30, -1).T) + 0.05 * np.eye(16)
    fresh = train.reshape(10, -1).mean(0) + rng.multivariate_normal(np.zeros(16), spread, 30)
    x = np.concatenate([train[rng.integers(0, 10, 30)], fresh.reshape(30, *SHAPE)])
    rows = evidence.detector_rows(
        known_model(law), {"net": {}}, evidence.images_of(to_uint8(x)), (0.05, 0.1), draws=4
    )
    for found in detectors.detect(rows, copies).values():
        assert found.auroc.low > 0.9 and found.precision[10].value == 1, found
    np.testing.assert_allclose(rows["flipd"][1, :30], 0, atol=0.1)  # a point has no dimension
    assert np.median(rows["flipd"][0, 30:]) == pytest.approx(16, abs=2)  # the normal law fills all
    np.testing.assert_allclose(rows["score_norm"][:, :30].mean(), 4, rtol=0.05)  # the root of 16


def test_bad_requests_are_one_line(images):
    model = make_model(CONFIG, 1)
    for call, words in (
        (lambda: evidence.detector_rows(model, {}, images, ()), "levels"),
        (lambda: evidence.detector_rows(model, {}, images, (0.0,)), "levels"),
        (lambda: evidence.detector_rows(model, {}, images, (1.0,), draws=0), "draws = 0"),
        (lambda: evidence.images_of(np.zeros((2, 4, 4, 1))), "uint8"),
        (
            lambda: evidence.detector_rows(
                model, {}, evidence.images_of(np.zeros((1, 8, 8, 1), np.uint8)), (1.0,)
            ),
            "8x8x1",
        ),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------- evaluation


def test_each_detector_has_its_direction():
    copies = np.array([True, True, False, False, False])
    up = np.array([5.0, 4.0, 1.0, 2.0, 3.0])
    rows = {"score_norm": np.stack([up, up]), "flipd": -up, "error": -up, "gap": up}
    assert {
        name: found.auroc.value for name, found in detectors.detect(rows, copies).items()
    } == dict.fromkeys(rows, 1)
    wrong = detectors.detect({"flipd": up}, copies)["flipd"]
    assert wrong.auroc.value == 0 and wrong.found.value == 0


def test_delongs_variance_by_brute_force():
    """The delete-one jackknife of a two-sample U-statistic, sample by sample, is DeLong's variance."""
    rng = np.random.default_rng(0)
    copies = np.arange(40) < 13
    scores = np.round(rng.normal(size=40) + copies, 1)  # with ties
    left = np.array([roc_auc_score(np.delete(copies, i), np.delete(scores, i)) for i in range(40)])
    parts = [
        (m - 1) / m * np.sum((left[at] - left[at].mean()) ** 2) for at, m in ((copies, 13), (~copies, 27))
    ]
    assert detectors.delong_variance(scores, copies) == pytest.approx(sum(parts), rel=1e-9)


@pytest.mark.parametrize(("m", "n", "shift"), [(15, 85, 1.0), (5, 200, 2.5), (10, 300, 2.0), (60, 60, 0.0)])
def test_the_interval_of_the_auroc_covers(m, n, shift):
    rng, truth, copies = np.random.default_rng(4), stats.norm.cdf(shift / np.sqrt(2)), np.arange(m + n) < m
    found = [detectors.auroc(rng.normal(size=m + n) + shift * copies, copies) for _ in range(300)]
    assert np.mean([each.low <= truth <= each.high for each in found]) > 0.925
    assert np.mean([each.high - each.low for each in found]) < 6 * np.std([each.value for each in found])


def test_perfect_and_empty_cases_claim_no_certainty():
    copies = np.arange(50) < 5
    perfect = detectors.auroc(copies * 1.0, copies)
    assert perfect.value == 1 and perfect.high == 1 and 0.5 < perfect.low < 0.9
    none = detectors.evaluate("flipd", np.arange(50.0), np.zeros(50, bool))
    assert np.isnan(none.auroc.value) and (none.auroc.low, none.auroc.high) == (0, 1)
    assert np.isnan(none.found.value) and none.precision[10].value == 0 and none.base.value == 0


def test_precision_and_share_found_by_hand():
    scores = np.arange(200.0)[::-1]
    copies = np.zeros(200, bool)
    copies[[0, 1, 3, 50]] = True  # 196 others: one false alarm is allowed, the 2 of rank 3 and 5 are too many
    found = detectors.evaluate("x", scores, copies, tops=(1, 3, 4, 100, 500))
    assert {k: each.value for k, each in found.precision.items()} == {1: 1, 3: 2 / 3, 4: 0.75, 100: 0.04}
    assert found.found.value == 0.75 and found.found.n == 4
    equal = detectors.evaluate("x", np.zeros(200), copies, tops=(10,))
    assert equal.precision[10].value == 0 and equal.auroc.value == 0.5 and equal.found.value == 0


def test_scores_must_be_finite():
    copies = np.arange(4) < 2
    with pytest.raises(UserError, match="2 of 4 scores are not finite"):
        detectors.detect({"gap": np.array([np.nan, 1, np.nan, 2])}, copies)
    with pytest.raises(UserError, match="no such detector"):
        detectors.detect({"gaps": np.zeros(4)}, copies)
    with pytest.raises(UserError, match="shape"):
        detectors.evaluate("gap", np.zeros(3), copies)
