"""Implicit labels: probes on made features, agreement against scikit-learn, and the features of both networks."""

import jax
import numpy as np
import pytest
from evidence_helper import drawn
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.denoiser import make_model
from mdiff.probes import gap, implicit
from mdiff.process.gaussian import bcast
from mdiff.recipes import evidence

LABELS = np.arange(150) % 3


def told(strength, seed=0, width=6):
    """[150,width] features that tell the label along one direction per label, in unit noise."""
    rng = np.random.default_rng(seed)
    return strength * np.eye(3, width)[LABELS] + rng.normal(size=(150, width))


# --------------------------------------------------------------------------------------- probes


def test_features_that_tell_nothing_are_at_chance():
    hits = implicit.hits(told(0), LABELS)
    assert 0.2 < hits.mean() < 0.45


def test_accuracy_is_that_of_bayes_rule():
    """Three unit normals at mutual distance d: a linear probe comes near the best possible rate, by simulation."""
    rng = np.random.default_rng(1)
    which = np.arange(60000) % 3
    x = 2.0 * np.eye(3)[which] + rng.normal(size=(60000, 3))
    best = np.mean(x.argmax(1) == which)
    found = np.mean([implicit.hits(told(2.0, seed), LABELS).mean() for seed in range(8)])
    assert best - 0.06 < found < best + 0.03


def test_the_probe_is_judged_on_what_it_has_not_seen():
    """Random labels can be learned by heart from many features; cross-validation does not fall for it."""
    rng = np.random.default_rng(0)
    assert implicit.hits(rng.normal(size=(150, 400)), LABELS).mean() < 0.5


def test_agreement_is_scikit_learns_with_intervals_that_hold_the_truth():
    rng = np.random.default_rng(2)
    noisy = np.where(rng.random(150) < 0.3, rng.integers(0, 3, 150), LABELS)
    found = implicit.agreement(noisy, LABELS)
    assert found.nmi.value == pytest.approx(normalized_mutual_info_score(LABELS, noisy))
    assert found.ari.value == pytest.approx(adjusted_rand_score(LABELS, noisy))
    many = np.arange(60000) % 3
    many_noisy = np.where(rng.random(60000) < 0.3, rng.integers(0, 3, 60000), many)
    assert found.ari.low < adjusted_rand_score(many, many_noisy) < found.ari.high
    same = implicit.agreement(LABELS, (LABELS + 1) % 3)
    assert same.nmi.value == pytest.approx(1) and same.ari.value == 1 and same.ari.high == 1
    none = implicit.agreement(rng.integers(0, 3, 150), LABELS)
    assert none.ari.low < 0 < none.ari.high


def test_spaces_levels_and_controls():
    levels = (0.1, 1.0)
    rows = {
        "network": np.stack([told(6), told(2)]),
        "pixels": np.stack([told(2, 1), told(0, 1)]),
        "untrained": np.stack([told(0, 2), told(0, 3)]),
    }
    clusters = np.where(LABELS == 2, -1, LABELS)
    found = implicit.implicit(rows, LABELS, levels, clusters=clusters)
    assert found.chance.value == pytest.approx(1 / 3)
    assert found.accuracy["network"][0].value > 0.95 > found.accuracy["network"][1].value
    assert set(found.above) == {"pixels", "untrained"}
    for control in found.above:
        for level in (0, 1):
            difference = found.accuracy["network"][level].value - found.accuracy[control][level].value
            assert found.above[control][level].value == pytest.approx(difference)
            assert found.above[control][level].low > 0
    assert found.labels["network"][0].ari.value > 0.9 and found.labels["untrained"][0].ari.value < 0.2
    assert found.clusters["network"][0].ari.value > 0.9 and found.clusters["network"][0].ari.n == 100


def test_bad_input_is_one_line():
    rows = told(1)
    for call, words in (
        (lambda: implicit.hits(rows * np.nan, LABELS), "not finite"),
        (lambda: implicit.hits(rows, LABELS * 0), "two labels"),
        (lambda: implicit.hits(rows, np.r_[LABELS[:-2], 7, 7]), "7 has 2 images"),
        (lambda: implicit.kmeans(rows, 200), "200 of 150"),
        (lambda: implicit.implicit({"network": rows}, LABELS, (0.1,)), r"\[levels, images, features\]"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------- features

NETS = {
    "unet": config.Net(channels=16, mults=(1, 1), blocks=1, attention=()),
    "dit": config.Net(arch="dit", channels=16, blocks=3, head_channels=8, patch=2),
}


@pytest.mark.parametrize("arch", NETS)
def test_features_are_means_over_positions_of_the_named_activation(arch):
    process = config.Process(kind="vp_cosine")
    model = make_model(config.Config(data=config.Data(size=4), net=NETS[arch], process=process), 1)
    params = drawn(model)
    images = evidence.images_of(np.random.default_rng(1).integers(0, 256, (66, 4, 4, 1), np.uint8))
    levels = (0.3, 2.0)
    found = evidence.features(model, params, images, levels, seed=5)
    pixels = evidence.noisy_pixels(model, images, levels, seed=5)
    assert found.shape == (2, 66, 16) and pixels.shape == (2, 66, 16)
    some, ids = images.x[-2:].astype(np.float32) / 127.5 - 1, np.array([64, 65])
    u = some + 2.0 * np.asarray(jax.jit(gap.fixed_noise, static_argnums=3)(5, 0, ids, (4, 4, 1)))
    np.testing.assert_allclose(pixels[1, -2:], u.reshape(2, -1), rtol=1e-5)
    name = {"unet": "mid2_1/out", "dit": "blocks/out"}[arch]

    @jax.jit
    def activation(u):
        t = jax.numpy.full(2, model.process.time(2.0))
        return model.apply(params, bcast(model.process.alpha(t), u) * u, t, None, taps=(name,))[1][name]

    value = np.asarray(activation(u))
    expected = value.mean((1, 2)) if arch == "unet" else value[1].mean(1)  # the middle of three blocks
    np.testing.assert_allclose(found[1, -2:], expected, rtol=1e-3, atol=1e-4)
    if arch == "dit":
        with pytest.raises(UserError, match="0 activations match"):
            evidence.features(model, params, images, (1.0,), taps="mid*/out")
        space = evidence.NetworkFeatures(model, params, 0.3)
        rows = space(images.x)
        assert space.name == "network@0.3" and rows.shape == (66, 16)
        # An image's features do not depend on the others, nor on its place.
        np.testing.assert_allclose(space(images.x[::-1][:5]), rows[::-1][:5], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(space(images.x / np.float32(127.5) - 1), rows, rtol=1e-4, atol=1e-5)
