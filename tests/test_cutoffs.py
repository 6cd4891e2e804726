"""Cutoffs per image and per stage, mixtures, noisy data only, the buffer, and sampling that ends at the cutoff."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import noise_images
from scipy import stats

from mdiff import config
from mdiff.data import cutoffs, reader, stream
from mdiff.data.source import Images
from mdiff.data.split import Subset
from mdiff.errors import UserError
from mdiff.keys import keys
from mdiff.nets.closed_form import gaussian
from mdiff.nets.denoiser import from_sigma_fn
from mdiff.objectives import ambient
from mdiff.process import laws
from mdiff.process.times import make_times
from mdiff.sample import sampler

SPAN = config.Process()
LAW = laws.make_process(SPAN)
IDS = np.array([7, 3, 12, 40, 5, 9, 11, 2], np.int32)


def whole(**fields):
    train = {name: fields.pop(name) for name in ("steps", "batch") if name in fields}
    return config.Config(loss=config.Loss(**fields), train=config.Train(**train))


def subset(n=8):
    images = Images("test", noise_images(n, 4, 4, 1), IDS[:n])
    return Subset(images, images.take(np.arange(0)), np.arange(n, dtype=np.int32))


# ------------------------------------------------------------------------------- which image, when


def test_images_of_their_own_cutoff():
    found = cutoffs.of_images(whole(cutoff=1.0, cutoff_of={3: 0.25, 40: 0.0}), IDS)
    np.testing.assert_array_equal(found, np.float32([1, 0.25, 1, 0, 1, 1, 1, 1]))
    # A planted copy of image 3 is as well protected as image 3.
    origin = np.array([7, 3, 3])
    np.testing.assert_array_equal(
        cutoffs.of_images(whole(cutoff=1.0, cutoff_of={3: 2.0}), origin), np.float32([1, 2, 2])
    )
    with pytest.raises(UserError, match=r"loss.cutoff_of: image 8 is not trained on"):
        cutoffs.of_images(whole(cutoff_of={8: 1.0}), IDS)


def test_a_mixture_draws_its_clean_images_once():
    ids = np.arange(1000)
    cfg = whole(cutoff=0.7, clean_share=0.3)
    found = cutoffs.of_images(cfg, ids)
    assert set(found) == {np.float32(0.7), np.float32(0)}
    assert (found == 0).sum() == 300
    np.testing.assert_array_equal(cutoffs.of_images(cfg, ids), found)
    # Not the first ones: which are clean is independent of the order.
    assert abs(np.corrcoef(found == 0, ids)[0, 1]) < 0.1
    twins = np.repeat(np.arange(50), 2)  # planted copies go with their original
    pairs = cutoffs.of_images(cfg, twins).reshape(50, 2)
    np.testing.assert_array_equal(pairs[:, 0], pairs[:, 1])


def test_stages_begin_at_their_steps():
    cfg = whole(cutoff_stages={0: 4.0, 10: 2.0, 25: 0.5}, steps=30)
    found = [cutoffs.stage(cfg, step) for step in (0, 9, 10, 24, 25, 29, 400)]
    assert found == [4.0, 4.0, 2.0, 2.0, 0.5, 0.5, 0.5]
    assert cutoffs.stage(whole(cutoff=1.0), 3) is None
    assert (cfg.loss.levels, cfg.loss.ladder) == ((0.5, 2.0, 4.0), (0.5, 2.0, 4.0))
    assert whole(cutoff=1.0, cutoff_of={3: 0.5}).loss.ladder == ()


@pytest.mark.parametrize("reading", ["memory", "disk"])
def test_batches_bring_cutoffs_and_copies(reading):
    """Through either reader: each image its cutoff, and y - x its noise at that level; stages by the step."""
    part = subset()
    for cfg, expected in (
        (whole(cutoff=1.0, cutoff_of={3: 0.25, 40: 0.0}, batch=8), None),
        (whole(cutoff_stages={0: 2.0, 1: 0.5}, batch=8), {0: 2.0, 1: 0.5}),
    ):
        cfg = replace(cfg, data=config.Data(reading=reading, size=4))
        found = {}
        batches = reader.make_reader(cfg, part)
        for step in (0, 1):
            raw = stream.gather(
                {name: jnp.asarray(value) for name, value in batches.resident.items()}, batches.batch(step)
            )
            found[step] = {k: np.asarray(v) for k, v in stream.finish(raw, jax.random.key(0), cfg).items()}
        batches.close()
        for step, batch in found.items():
            assert set(batch) == {"x", "id", "y", "cutoff"}
            if expected is None:
                level = np.select([batch["id"] == 3, batch["id"] == 40], [0.25, 0.0], 1.0)
            else:
                level = np.full(8, expected[step])
            np.testing.assert_array_equal(batch["cutoff"], np.float32(level))
            spread = (batch["y"] - batch["x"]).std((1, 2, 3))
            np.testing.assert_allclose(spread[level > 0] / level[level > 0], 1.0, atol=0.6)
            assert (spread[level == 0] == 0).all()
        order = [np.argsort(found[step]["id"]) for step in (0, 1)]
        first, second = ((found[s]["y"] - found[s]["x"])[order[s]].ravel() for s in (0, 1))
        if expected is None:
            np.testing.assert_array_equal(first, second)  # one draw for good
        else:
            # The noise at 2.0 is that at 0.5 and more: covariance 0.25, not 1 as for scaled noise.
            assert np.mean(first * second) == pytest.approx(0.25, abs=0.12)
            assert np.corrcoef(first - second, second)[0, 1] == pytest.approx(0, abs=0.25)


def test_one_picture_has_one_cutoff():
    """Under two ids, or mirrored: x + s n and x + t n would give x away."""
    part = subset()
    part.train.x[5] = part.train.x[1, :, ::-1]
    with pytest.raises(UserError, match=r"images 3 and 9 are one picture with cutoffs 0.5 and 1"):
        reader.make_reader(whole(cutoff=1.0, cutoff_of={3: 0.5}, batch=8), part)
    reader.make_reader(whole(cutoff=1.0, cutoff_of={3: 0.5, 9: 0.5}, batch=8), part)
    reader.make_reader(whole(cutoff=1.0, cutoff_of={3: 0.0}, batch=8), part)  # it is seen clean anyway


# ------------------------------------------------------------------------------------ noise levels


def draws(cutoff, n=40_000, **fields):
    times = make_times(config.Loss(**{"cutoff": 1.0, **fields}), LAW, SPAN)
    return np.asarray(jax.jit(lambda key: times.draw(key, n, cutoff))(jax.random.key(0)))


def lognormal(sigma):
    return stats.norm.cdf((np.log(np.float64(sigma)) + 1.2) / 1.2)


def test_the_share_holds_for_every_images_cutoff():
    each = jnp.tile(jnp.float32([0.25, 1.0, 4.0, 0.0]), 10_000)
    found = draws(each, share=0.5)
    for level in (0.25, 1.0, 4.0):
        own = found[np.asarray(each) == np.float32(level)]
        assert stats.binomtest(int((own >= np.float32(level)).sum()), len(own), 0.5).pvalue > 1e-3
        below = lognormal(own[own < np.float32(level)]) / lognormal(level)
        assert stats.kstest(below, "uniform").pvalue > 1e-3
    # A clean image has one branch: the law itself.
    assert stats.kstest(lognormal(found[np.asarray(each) == 0]), "uniform").pvalue > 1e-3


def test_noisy_data_alone_draws_nothing_below():
    each = jnp.tile(jnp.float32([0.25, 1.0]), 20_000)
    found = draws(each, clean="never")
    assert (found >= np.asarray(each)).all()
    for level in (0.25, 1.0):
        own = lognormal(found[np.asarray(each) == np.float32(level)])
        rest = 1 - lognormal(level)
        assert stats.kstest((own - lognormal(level)) / rest, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_the_buffer_is_drawn_elsewhere(share):
    """max_gain 4: 1/a = 4 at sigma = tn sqrt(4/3). Nothing is drawn between; the branches keep their law."""
    found = draws(None, share=share, buffer="redraw", max_gain=4.0)
    end = np.sqrt(4 / 3)
    assert not ((found >= 1.0) & (found < end * (1 - 1e-6))).any()
    under, over = lognormal(1.0), 1 - lognormal(end)
    expected = share or over / (under + over)
    assert stats.binomtest(int((found >= 1.0).sum()), len(found), expected).pvalue > 1e-3
    upper = (lognormal(found[found >= 1.0]) - lognormal(end)) / over
    assert stats.kstest(upper, "uniform").pvalue > 1e-3
    # Every draw has a weight: with weight x0 the dropped buffer would give 0.
    cfg = config.Loss(cutoff=1.0, weight="x0", buffer="redraw", max_gain=4.0)
    sigma = jnp.asarray(found[found >= 1.0])
    weights = ambient.ambient_weight(jnp.ones_like(sigma), ambient.mixing(sigma, 1.0), cfg, 1.0)
    assert float(weights.min()) > 0
    assert float(weights.max()) <= 16.1


def test_cdf_inverts_every_branch():
    u = jnp.float32(np.random.default_rng(0).uniform(0.001, 0.999, 2000))
    cutoff = jnp.tile(jnp.float32([0.0, 0.3, 1.0, 3.0]), 500)
    for fields in (
        {"share": 0.3},
        {"clean": "never"},
        {"buffer": "redraw"},
        {"share": 0.7, "buffer": "redraw"},
    ):
        times = make_times(config.Loss(cutoff=1.0, **fields), LAW, SPAN)
        found = times.cdf(times.sigma(u, cutoff), cutoff)
        np.testing.assert_allclose(found, u, atol=3e-5)


# --------------------------------------------------------------------------------------- the loss


def losses(x, y, sigma, cutoff, cfg, d):
    error, a = ambient.routed_error(lambda xt, s, k: d * xt, x, y, sigma, jnp.ones_like(x), cutoff, None)
    return np.asarray(ambient.weigh(error, a, jnp.ones_like(sigma), sigma, cfg, cutoff=cutoff)), np.asarray(a)


def test_each_example_has_its_own_branch():
    """One batch of cutoffs 0, 0.5 and 2 gives each example the loss of a batch of its own cutoff."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(6, 2, 2, 1)), jnp.float32) for _ in range(2))
    sigma, cutoff = jnp.float32([1.0, 0.1, 1.0, 0.1, 1.0, 3.0]), jnp.float32([0, 0, 0.5, 0.5, 2, 2])
    for weight in ("edm", "x0", "inverse_variance"):
        cfg = config.Loss(cutoff=9.0, weight=weight)
        mixed, a = losses(x, y, sigma, cutoff, cfg, 0.4)
        for i in range(6):
            tn, s = float(cutoff[i]), float(sigma[i])
            noisy = s >= tn > 0
            ours = 1 - tn**2 / s**2 if noisy else 1.0
            assert a[i] == pytest.approx(ours, rel=1e-6)
            target = np.float64((y if noisy else x)[i])
            xt = target + (np.sqrt(s**2 - tn**2) if noisy else s)
            error = ((ours * 0.4 * xt + (1 - ours) * xt - target) ** 2).mean()
            factor = {"edm": 1.0, "x0": ours**-2, "inverse_variance": 1 / (ours**2 + ours * tn**2)}[weight]
            assert mixed[i] == pytest.approx(error * (factor if noisy else 1.0), rel=1e-5)


# -------------------------------------------------------------------------------- truncated sampling


def test_noisy_data_alone_is_sampled_down_to_its_cutoff():
    for fields, expected in (
        ({"cutoff": 0.5, "clean": "never"}, 0.5),
        ({"cutoff": 0.5, "cutoff_of": {3: 0.2}, "clean": "never"}, 0.2),
        ({"cutoff": 0.5, "clean": "never", "clean_share": 0.1}, 0.0),
        ({"cutoff": 0.5, "clean": "never", "consistency": 1.0}, 0.0),
        ({"cutoff": 0.5}, 0.0),
        ({}, 0.0),
    ):
        assert sampler.settings(whole(**fields)).until == expected
    asked = config.Config(loss=config.Loss(cutoff=0.5, clean="never"), sample=config.Sample(until=0.0))
    assert sampler.settings(asked).until == 0.0


@pytest.mark.parametrize("method", ["heun", "euler", "ddim", "ddpm", "dpmpp2m", "sde"])
def test_truncated_samples_are_posterior_means_at_the_cutoff(method):
    """Normal data, exact denoiser: what comes out is E[x0 | x at tn], of variance s^4 / (s^2 + tn^2), not s^2."""
    images = np.random.default_rng(0).normal(size=(4000, 1, 1, 1)) * 0.6
    std, tn = images.std(), 0.5
    denoise = from_sigma_fn(gaussian(np.float32(images), ridge=0.0), LAW)
    for until, variance in ((tn, std**4 / (std**2 + tn**2)), (0.0, std**2)):
        cfg = config.Sample(method=method, steps=500, until=until)
        every = keys(0, "sample", jnp.arange(4000))
        found = np.asarray(jax.jit(lambda k, c=cfg: sampler.sample(LAW, c, denoise, k, (1, 1, 1)))(every))
        assert found.var() == pytest.approx(variance, rel=0.12)


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"cutoff": 0.001},
            "loss.cutoff = 0.001: must be 0 (plain training) or inside the noise range (0.002, 80",
        ),
        ({"cutoff": 90.0}, "loss.cutoff = 90.0: must be 0"),
        ({"cutoff": -1.0}, "loss.cutoff = -1.0: must be 0"),
        ({"cutoff_of": {3: -0.5}}, "loss.cutoff_of: image 3: -0.5: must be 0"),
        ({"cutoff_of": {3: 99.0}}, "loss.cutoff_of: image 3: 99.0: must be 0"),
        ({"cutoff_stages": {0: 1.0, 5: -2.0}}, "loss.cutoff_stages: step 5: -2.0: must be 0"),
        ({"cutoff_stages": {3: 1.0}}, "loss.cutoff_stages: the first stage begins at step 3"),
        ({"cutoff_stages": {0: 1.0}, "cutoff": 2.0}, "loss.cutoff = 2.0: the stages of loss.cutoff_stages"),
        ({"cutoff_stages": {0: 1.0}, "clean_share": 0.5}, "loss.clean_share = 0.5: the stages"),
        ({"clean_share": 0.5}, "loss.clean_share = 0.5: needs a loss.cutoff above 0"),
        ({"clean_share": 1.0, "cutoff": 1.0}, "loss.clean_share = 1.0: must be in [0, 1)"),
        ({"clean": "never"}, "loss.clean = never: needs a loss.cutoff above 0"),
        ({"buffer": "redraw"}, "loss.buffer = redraw: needs a loss.cutoff above 0"),
        ({"consistency": -1.0, "cutoff": 1.0}, "loss.consistency = -1.0: must be 0 (off) or above"),
        ({"consistency": 1.0, "cutoff": 1.0}, "loss.consistency = 1.0: clean images teach"),
        (
            {"consistency": 1.0, "cutoff": 1.0, "clean": "never", "consistency_steps": 0},
            "loss.consistency_steps = 0: must be 1 or more",
        ),
    ],
)
def test_bad_cutoffs_are_named(fields, words):
    with pytest.raises(UserError) as caught:
        ambient.check(config.Loss(**fields), SPAN)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_until_is_named():
    with pytest.raises(UserError, match=r"sample.until = -1.0: must be 0 or above"):
        sampler.check(config.Sample(until=-1.0))
