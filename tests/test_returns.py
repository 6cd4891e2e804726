"""Return rates: verdicts by hand, and denoisers whose returns are known in closed form."""

import functools
import itertools

import jax
import numpy as np
import pytest
from evidence_helper import SHAPE, drawn, tiny_model

from mdiff import config
from mdiff.data import source
from mdiff.data.split import split
from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.nets import closed_form
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.probes import gap, returns, sets
from mdiff.process.laws import VarianceExploding
from mdiff.process.times import make_grid
from mdiff.recipes import evidence
from mdiff.sample import sampler
from mdiff.sample.steps import METHODS
from mdiff.types import to_float, to_uint8

RULES, PROCESS = config.Audit(), VarianceExploding()
DDIM = config.Sample(method="ddim", steps=12)


@pytest.fixture(scope="module")
def faces():
    cfg = config.Data(source="faces", size=8, n=40, heldout=40)
    subset = split(cfg, source.load(cfg.source, cfg.size))
    return np.asarray(subset.train.x), np.asarray(subset.heldout.x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _back(fn, method, x0, times, ids):
    u = x0 + PROCESS.noise_level(times[0]) * gap.fixed_noise(0, 0, ids, x0.shape[1:])
    step = METHODS[method](PROCESS, config.Sample(method=method, steps=12))
    return sampler.descend(from_sigma_fn(fn, PROCESS), step, u, times, keys(0, "r", ids))


def back(fn, images, levels, method="ddim"):
    ids = np.arange(len(images), dtype=np.int32)
    grids = [make_grid(PROCESS, "karras", 12, PROCESS.sigma_min, level) for level in levels]
    return np.stack([to_uint8(_back(fn, method, to_float(images), grid, ids)) for grid in grids])


# --------------------------------------------------------------------------------- what comes back


def test_a_memorizer_returns_its_own_and_pulls_the_rest(faces):
    """From low noise D* leads back to the nearest training image: hits return always, held-out images never to themselves."""
    train, heldout = faces
    fn, home = closed_form.empirical(to_float(train)), np.arange(40)
    levels = (0.1, 20.0)
    groups = {
        "hits": returns.Group(back(fn, train, levels), home, train),
        "heldout": returns.Group(back(fn, heldout, levels), home, heldout),
    }
    found = returns.returns(groups, levels, train, RULES)
    assert found.home["hits"][0].value == 1 and found.home["hits"][0].n == 40
    assert found.home["heldout"][0].value == 0
    assert found.training["heldout"][0].value > 0.95
    # From noise that hides everything it ends on a training image, but only by chance on the same.
    assert found.training["hits"][1].value > 0.95 and found.home["hits"][1].value < 0.3


def test_who_knows_no_images_returns_all_from_little_noise_and_none_from_much(faces):
    train, heldout = faces
    fn, home, levels = closed_form.gaussian(to_float(np.concatenate(faces))), np.arange(40), (0.02, 20.0)
    groups = {
        name: returns.Group(back(fn, x, levels, "heun"), home, x)
        for name, x in (("hits", train), ("heldout", heldout))
    }
    found = returns.returns(groups, levels, train, RULES)
    for name in groups:
        assert found.home[name][0].value == 1 and found.home[name][1].value < 0.1
    assert found.training["heldout"][0].value < 0.1


def test_descending_follows_the_flow_of_a_normal_law():
    """x = s n: the flow from sigma to 0 multiplies by s / sqrt(s^2 + sigma^2)."""
    x0 = np.random.default_rng(0).normal(size=(5, *SHAPE)).astype(np.float32)
    ids, level = np.arange(5, dtype=np.int32), 1.5
    grid = make_grid(PROCESS, "karras", 80, PROCESS.sigma_min, level)
    noisy = x0 + level * np.asarray(jax.jit(gap.fixed_noise, static_argnums=3)(0, 0, ids, SHAPE))

    def normal(x, sigma):
        return x * 0.25 / (0.25 + sigma[:, None, None, None] ** 2)

    expected = noisy * 0.5 / np.hypot(0.5, level)
    np.testing.assert_allclose(np.asarray(_back(normal, "heun", x0, grid, ids)), expected, rtol=2e-3)
    # The mean alone: a constant answer is reached whatever the noise.
    ends = _back(lambda x, sigma: 0 * x + 0.3, "ddim", x0, grid, ids)
    np.testing.assert_allclose(np.asarray(ends), 0.3, atol=1e-5)


# ------------------------------------------------------------------------------------ the verdicts


def pictures(*levels):
    """One flat picture for each grey level, as uint8 [N,4,4,1]."""
    return np.stack([np.full(SHAPE, level, np.uint8) for level in levels])


def test_verdicts_by_hand():
    reference = sets.reference(pictures(0, 90, 91, 250), config.Audit(near_duplicate=0.05))
    assert reference.labels[1] == reference.labels[2]  # near-duplicates are one image
    images, home = pictures(5, 5, 90, 91, 45, 249), np.array([0, 1, 2, 1, 0, 3])
    # 5 is 85 from the next image: ratio 5/85; 45 is in the middle of two; 249 is near 250 alone.
    assert returns.came_back(images, home, reference).tolist() == [True, False, True, True, False, True]


def test_rates_and_the_empty_group():
    train = pictures(0, 90, 250)
    images = np.stack([pictures(1, 89, 249, 91), pictures(1, 1, 1, 45)])
    home = np.array([0, 1, 2, 2])
    groups = {
        "hits": returns.Group(images, home, train),
        "others": returns.Group(images[:, :0], home[:0], train),
    }
    found = returns.returns(groups, (0.1, 1.0), train, RULES)
    assert [each.value for each in found.home["hits"]] == [0.75, 0.25]
    assert [each.value for each in found.training["hits"]] == [1.0, 0.75]
    assert found.home["hits"][0].low < 0.75 < found.home["hits"][0].high < 1
    assert np.isnan(found.home["others"][0].value) and found.home["others"][0].n == 0


def test_mirrored_returns_count_when_flips_do():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (4, *SHAPE), np.uint8)
    mirrored, home = train[:, :, ::-1], np.arange(4)
    for flips in (False, True):
        side = sets.reference(train, config.Audit(flips=flips))
        assert returns.came_back(mirrored, home, side).all() == flips


# ------------------------------------------------------------------------------------- of a model


def test_a_model_returns_what_its_denoiser_does():
    """Every level by one program, batches and all, against Euler's steps in float64 numpy."""
    model = tiny_model()
    params = drawn(model)
    x = np.random.default_rng(1).integers(0, 256, (70, *SHAPE), np.uint8)
    levels = (0.4, 2.0)
    found = evidence.noised_and_denoised(model, params, evidence.images_of(x), levels, DDIM)
    assert found.shape == (2, 70, *SHAPE) and found.dtype == np.uint8

    @jax.jit
    def answer(u, sigma):
        t = jax.numpy.full(len(u), PROCESS.time(sigma))
        return model.denoiser(params)(u, t, None).x0

    some, noise = x[-3:], jax.jit(gap.fixed_noise, static_argnums=3)(0, 0, np.arange(67, 70), SHAPE)
    for level, images in zip(levels, found, strict=True):
        sigmas = np.append(np.linspace(level ** (1 / 7), 0.002 ** (1 / 7), 12) ** 7, 0)
        u = some / 127.5 - 1 + level * np.asarray(noise, np.float64)
        for high, low in itertools.pairwise(sigmas):
            d = np.asarray(answer(u.astype(np.float32), np.float32(high)), np.float64)
            u = d + low / high * (u - d)
        assert np.abs(images[-3:].astype(int) - to_uint8(u)).max() <= 1
    assert np.abs(found[0].astype(int) - x).mean() < np.abs(found[1].astype(int) - x).mean()


def test_bad_requests_are_one_line():
    model, images = tiny_model(), evidence.images_of(pictures(0, 9))
    train = pictures(0, 90, 250)

    def judge(back, home):
        return returns.returns({"hits": returns.Group(back, home, train)}, (0.5,), train, RULES)

    for call, words in (
        (
            lambda: evidence.noised_and_denoised(model, {}, images, (1.0,), config.Sample(churn=2.0)),
            "churn 2",
        ),
        (
            lambda: evidence.noised_and_denoised(model, {}, images, (1.0,), config.Sample(method="sde")),
            "'sde'",
        ),
        (lambda: evidence.noised_and_denoised(model, {}, images, (0.001, 1.0), DDIM), "0.001 is not above"),
        (lambda: judge(np.zeros((1, 2, *SHAPE), np.uint8), np.array([0])), "one home per image"),
        (lambda: judge(np.zeros((1, 2, *SHAPE), np.uint8), np.array([0, 3])), "indices into it"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
