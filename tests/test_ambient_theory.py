"""The minimum of the ambient loss, in closed form: where its samples end, and that they are copies all the same."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from mdiff import config
from mdiff.data import source
from mdiff.data.degrade import noise_keys, noisy_copy
from mdiff.data.split import split
from mdiff.errors import UserError
from mdiff.nets import closed_form
from mdiff.objectives import ambient
from mdiff.recipes.experiment import audit_denoiser
from mdiff.types import to_float

RULES = config.Audit(bootstrap=20)


@pytest.fixture(scope="module")
def faces():
    cfg = config.Data(source="faces", size=16, n=50, heldout=50)
    subset = split(cfg, source.load(cfg.source, cfg.size))
    return subset.train.x, subset.heldout.x


def copies(x, cutoff, seed=0):
    """mdiff's own noisy copies of uint8 images."""
    return np.asarray(noisy_copy(jnp.asarray(to_float(x)), noise_keys(x), cutoff, seed))


@pytest.fixture(scope="module")
def few():
    """Seven images of six values, and noisy copies at 0.6."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.uniform(-1, 1, (7, 3, 2, 1)))
    return x, np.float32(x + 0.6 * rng.normal(size=x.shape))


def at(fn, x, sigma):
    return np.asarray(fn(jnp.float32(x), jnp.broadcast_to(jnp.float32(sigma), len(x))), np.float64)


# ------------------------------------------------------------------------------ it is the minimum


@pytest.mark.parametrize("sigma", [0.62, 0.8, 2.0, 30.0])
def test_no_other_answer_has_less_ambient_loss(few, sigma):
    """The loss of the objective's own code, averaged over which copy made xt, is least at this answer, and strictly."""
    x, y = few
    cutoff, rng = 0.6, np.random.default_rng(1)
    u = np.sqrt(sigma**2 - cutoff**2)
    xt = np.float64(np.float32(y[2:3] + u * rng.normal(size=y[:1].shape)))
    density = np.exp(-((xt - np.float64(y)) ** 2).sum((1, 2, 3)) / (2 * u**2))
    answer = at(closed_form.ambient(x, y, cutoff), xt, sigma)

    def loss(given):
        """Every copy in turn, with the noise that leads from it to xt."""
        z = (np.float64(xt) - y) / u
        error, _ = ambient.routed_error(
            lambda *_: jnp.float32(np.broadcast_to(given, y.shape)), jnp.float32(x), jnp.float32(y),
            jnp.full(len(y), sigma), jnp.float32(z), cutoff, jax.random.key(0),
        )  # fmt: skip
        return float(np.sum(density * np.asarray(error, np.float64)) / density.sum())

    a = 1 - cutoff**2 / sigma**2
    least = loss(answer)
    for move in np.eye(6).reshape(6, 1, 3, 2, 1) * 0.3 / a:
        for sign in (1, -1):
            # A quadratic: away from its minimum it rises by a^2 times the squared move.
            rise = loss(answer + sign * move) - least
            assert rise == pytest.approx(a**2 * np.mean(move**2), rel=2e-2)


@pytest.mark.parametrize("sigma", [0.62, 0.7, 1.0, 4.0])
def test_above_the_cutoff_the_score_is_that_of_the_smoothed_copies(few, sigma):
    x, y = few
    u, step = np.sqrt(sigma**2 - 0.6**2), 1e-5
    flat = np.float64(y).reshape(7, 6)
    xt = np.float64(np.float32(flat + u * np.random.default_rng(1).normal(size=flat.shape)))

    def log_density(point):
        return np.log(np.mean(np.exp(-((point - flat) ** 2).sum(1) / (2 * u**2))))

    slopes = [
        [(log_density(row + move) - log_density(row - move)) / (2 * step) for move in step * np.eye(6)]
        for row in xt
    ]
    answer = at(closed_form.ambient(x, y, 0.6), xt.reshape(y.shape), sigma).reshape(7, 6)
    np.testing.assert_allclose((answer - xt) / sigma**2, slopes, rtol=2e-3, atol=1e-3 / sigma**2)


def test_below_the_cutoff_it_knows_the_images(few):
    x, y = few
    fn = closed_form.ambient(x, y, 0.6)
    xt = y + 0.1
    np.testing.assert_array_equal(at(fn, xt, 0.3), at(closed_form.empirical(x), xt, 0.3))
    np.testing.assert_array_equal(
        at(fn, xt, 0.6), at(closed_form.empirical(x), xt, 0.6)
    )  # any D is a minimum
    np.testing.assert_allclose(at(fn, x + 1e-3, 0.01), x, atol=1e-6)  # the nearest image (T5)


def test_far_above_the_cutoff_it_is_the_mean_of_the_copies(few):
    x, y = few
    found = at(closed_form.ambient(x, y, 0.6), x, 1e3)
    np.testing.assert_allclose(found, np.broadcast_to(y.mean(0), x.shape), atol=1e-4)
    assert np.abs(y.mean(0) - x.mean(0)).max() > 0.05  # which is not that of the images


def test_levels_of_a_batch_are_routed_one_by_one(few):
    x, y = few
    fn = closed_form.ambient(x, y, 0.6)
    sigma = np.float32([0.01, 0.59, 0.6, 0.61, 1, 10, 80])
    together = at(fn, y, sigma)
    for i, level in enumerate(sigma):
        np.testing.assert_allclose(together[i], at(fn, y[i : i + 1], level)[0], rtol=1e-5, atol=1e-5)


def test_numbers_stay_finite_next_to_the_cutoff(few):
    """At the cutoff and one step of float32 beside it, from 1e-3 to 1e3, and in the gradient in sigma too (T10)."""
    x, y = few
    for cutoff in np.float32([1e-3, 0.6, 1e3]):
        fn = closed_form.ambient(x, y, float(cutoff))
        both = jax.jit(jax.value_and_grad(lambda s, fn=fn: fn(jnp.asarray(x), jnp.full(7, s)).sum()))
        for sigma in (np.nextafter(cutoff, np.float32(0)), cutoff, np.nextafter(cutoff, np.float32(2e3))):
            value, slope = both(sigma)
            assert np.isfinite(value) and np.isfinite(slope), (cutoff, sigma)


def test_compiled_the_empirical_denoiser_finds_the_nearest_image_at_any_noise(few):
    """Logits of 1e12 and more, which a compiler may work out twice, in two ways."""
    x, _ = few
    points = np.float32(np.random.default_rng(3).uniform(-1.5, 1.5, (9, 3, 2, 1)))
    nearest = ((np.float64(points)[:, None] - x[None]) ** 2).sum((2, 3, 4)).argmin(1)
    fn = jax.jit(closed_form.empirical(x))
    for sigma in (1e-3, 1e-5, 5e-7, 1e-9):
        np.testing.assert_allclose(at(fn, points, sigma), x[nearest], atol=1e-6)


@pytest.mark.parametrize(("cutoff", "word"), [(0.0, "above 0"), (-1.0, "cutoff = -1"), (float("nan"), "nan")])
def test_a_cutoff_of_0_is_refused(few, cutoff, word):
    with pytest.raises(UserError, match=word):
        closed_form.ambient(*few, cutoff)


def test_one_copy_of_each_image(few):
    with pytest.raises(UserError, match="one copy of each"):
        closed_form.ambient(few[0], few[1][:5], 0.6)


# ------------------------------------------------------------------- where samples end (T6, lemma 4.1)


def flow(fn, x, levels, speed):
    """Heun's method in float64 numpy along `levels`; speed(x, level, D) is dx/dlevel."""
    for here, there in itertools.pairwise(levels):
        slope = speed(x, here, fn(x, here))
        euler = x + (there - here) * slope
        x = x + (there - here) / 2 * (slope + speed(euler, there, fn(euler, there)))
    return x


def karras(high, low, steps):
    return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7


@pytest.fixture(scope="module")
def ends(faces):
    """cutoff -> (images, copies, end points of 200 samples at the cutoff), of the flow in u = sqrt(sigma^2 - tn^2)."""
    found = {}
    for cutoff in (0.4, 1.0, 4.0):
        x, y = to_float(faces[0]), copies(faces[0], cutoff)
        fn = jax.jit(closed_form.ambient(x, y, cutoff))

        def denoise(point, u, fn=fn, cutoff=cutoff):
            return at(fn, point, np.hypot(u, cutoff))

        def speed(point, u, answer, cutoff=cutoff):
            return (point - answer) * u / (u**2 + cutoff**2)  # dx/dsigma dsigma/du

        start = 80 * np.random.default_rng(0).normal(size=(200, 16, 16, 1))
        found[cutoff] = x, y, flow(denoise, start, karras(80.0, 1e-3 * cutoff, 60), speed)
    return found


@pytest.mark.parametrize("cutoff", [0.4, 1.0, 4.0])
def test_samples_arrive_at_the_noisy_copies(ends, cutoff):
    """Each at one of them, at all alike, and none at an image."""
    x, y, end = ends[cutoff]
    to_copies = np.sqrt(((end[:, None] - y[None]) ** 2).mean((2, 3, 4)))
    to_images = np.sqrt(((end[:, None] - x[None]) ** 2).mean((2, 3, 4)))
    assert to_copies.min(1).max() < 2e-3 * cutoff
    assert to_images.min(1).min() > 0.7 * cutoff
    hits = np.bincount(to_copies.argmin(1), minlength=50)
    assert stats.chisquare(hits).pvalue > 1e-3


def test_on_from_the_copies_samples_become_images_all_the_same(ends):
    """Below the cutoff the optimum knows the images: Gu's ratio makes every sample a copy, at every cutoff."""
    preserved = {}
    for cutoff, (x, y, end) in ends.items():
        clean = jax.jit(closed_form.empirical(x))

        def denoise(point, sigma, clean=clean):
            return at(clean, point, sigma)

        last = flow(denoise, end, karras(cutoff, 0.002, 40), lambda point, s, answer: (point - answer) / s)
        distance = np.sort(np.sqrt(((last[:, None] - x[None]) ** 2).sum((2, 3, 4))), 1)
        assert np.all(distance[:, 0] < distance[:, 1] / 3), cutoff
        whose = ((end[:, None] - y[None]) ** 2).sum((2, 3, 4)).argmin(1)
        became = ((last[:, None] - x[None]) ** 2).sum((2, 3, 4)).argmin(1)
        preserved[cutoff] = np.mean(whose == became)
    # Which image a copy becomes is its own one, until the noise hides whose copy it is.
    assert preserved[0.4] == 1.0 and preserved[0.4] > preserved[1.0] > preserved[4.0], preserved


@pytest.mark.parametrize("cutoff", [0.4, 4.0])
def test_the_samplers_own_generations_are_copies(faces, cutoff):
    """Through mdiff's sampler and audit, on a grid that knows nothing of the cutoff."""
    fn = closed_form.ambient(to_float(faces[0]), copies(faces[0], cutoff), cutoff)
    draws = replace(config.Sample(), n=128, batch=128)
    found = audit_denoiser(fn, *faces, sample_as=draws, rules=RULES).estimates
    assert found["memorized"].value == 1.0
    assert found["control"].high < 0.05
    assert found["unique"].value > 0.7


# ----------------------------------------------------------------- noise at two levels, by mdiff's own code


def test_one_noise_at_two_cutoffs_gives_the_image_away(faces):
    """Two runs of one seed and different cutoffs: two equations for two unknowns. Why a schedule nests its noise."""
    low, high = copies(faces[0], 0.5), copies(faces[0], 2.0)
    np.testing.assert_allclose((2.0 * low - 0.5 * high) / 1.5, to_float(faces[0]), atol=1e-5)


def test_nested_noise_adds_nothing(faces):
    """The step from the less to the more noisy copy is independent of the image and of the noise before it."""
    x, keys = jnp.asarray(to_float(faces[0])), noise_keys(faces[0])
    low, high = (np.asarray(noisy_copy(x, keys, level, 0, (0.5, 2.0))) for level in (0.5, 2.0))
    step = (high - low).ravel()
    assert step.std() == pytest.approx(np.sqrt(2.0**2 - 0.5**2), rel=0.03)
    for other in ((low - x).ravel(), np.asarray(x).ravel()):
        assert abs(np.corrcoef(step, other)[0, 1]) < 4 / np.sqrt(step.size)
    # So the best combination of both copies is the less noisy one alone.
    columns = np.stack([low.ravel(), high.ravel()], 1)
    weights = np.linalg.lstsq(columns - columns.mean(0), np.asarray(x).ravel(), rcond=None)[0]
    assert abs(weights[1]) < 0.02 < weights[0]
