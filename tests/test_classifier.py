"""The time-dependent classifier: what it sees, what it is told, and what follows from its parameters alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config, side
from mdiff.errors import UserError
from mdiff.nets import classifier as classifiers
from mdiff.process.laws import make_process
from mdiff.trees import map_named, named_leaves

VE = make_process(config.Process())
KINDS = ("ve", "vp_linear", "vp_cosine", "flow")


def span(kind: str) -> config.Process:
    return config.Process(kind=kind, sigma_max=80.0 if kind != "vp_linear" else 100.0)


def made(process=VE, shape=(4, 4, 1), classes=3, **fields):
    """A small classifier, and parameters none of which is zero."""
    cfg = side.Classifier(**{"width": 8, "blocks": (1, 1), **fields})
    found = classifiers.make_classifier(cfg, process, shape, classes, 0.5)
    return found, moved(jax.eval_shape(found.init, jax.random.key(0)))


def moved(params, seed: int = 5):
    """Random parameters of these shapes, scales near one; numpy, since compiling as many draws takes a minute."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        wide = leaf.shape[-2] * 9 if leaf.ndim == 4 else leaf.shape[0]
        noise = rng.normal(size=leaf.shape) / np.sqrt(wide if leaf.ndim > 1 else 10)
        return jnp.asarray(noise + name.endswith("scale"), jnp.float32)

    return map_named(draw, params)


def images(n: int, shape=(4, 4, 1), seed: int = 1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, *shape)), jnp.float32)


@pytest.fixture(scope="module")
def timed():
    return made()


@pytest.fixture(scope="module")
def logits(timed):
    return jax.jit(timed[0].logits)


def unscaled(xt, t, process=VE):
    """xt whose scaled version is the same at all t, so that only what the network is told differs."""
    r = np.sqrt(np.asarray(process.sigma(t)) ** 2 + 0.25 * np.asarray(process.alpha(t)) ** 2)
    return xt * r[:, None, None, None]


def test_time_says_nothing_at_first_and_something_later(timed, logits):
    found, other = timed
    params = jax.jit(found.init, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    x, early, late = images(6), jnp.full(6, 0.2), jnp.full(6, 0.8)
    same = [np.asarray(logits(params, unscaled(x, t), t)) for t in (early, late)]
    np.testing.assert_allclose(*same, atol=2e-5)
    assert np.std(same[0], axis=0).max() > 0.01  # it does look at the image
    different = [np.asarray(logits(other, unscaled(x, t), t)) for t in (early, late)]
    assert np.abs(different[0] - different[1]).max() > 0.01
    told = [leaf for name, leaf in named_leaves(params) if "/time/" in name]
    assert len(told) == 2 * 2 and all(
        not np.any(leaf) for leaf in told
    )  # kernel and bias, one insertion per block


def test_resnet_34_has_its_weights():
    """Of torchvision's resnet34 (21,797,672), with another stem, no biases but the head's, no time, 2x2 means."""
    found = classifiers.make_classifier(side.Classifier(width=64, timed=False), VE, (32, 32, 3), 1000, 0.5)
    shapes = jax.eval_shape(found.init, jax.random.key(0))
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 21_797_672 - stem


@pytest.mark.parametrize("arch", ["resnet", "half_unet"])
def test_without_time_nothing_depends_on_it(arch):
    found, params = made(arch=arch, timed=False)
    params = {**params, "temperature": classifiers.temperatures((0.1, 1.0), (2.0, 2.0))}
    x = images(3)
    logits = jax.jit(found.logits)
    first = np.asarray(logits(params, x, jnp.full(3, 0.0)))
    for t in (0.3, 1.0):
        np.testing.assert_array_equal(np.asarray(logits(params, x, jnp.full(3, t))), first)


def test_half_unet_listens_to_time_and_image():
    found, params = made(arch="half_unet")
    logits = jax.jit(found.logits)
    t = jnp.array([0.1, 0.5, 0.9])
    at = [np.asarray(logits(params, unscaled(images(3), each), each)) for each in (t, t[::-1])]
    assert np.abs(at[0] - at[1])[[0, 2]].max() > 1e-3
    np.testing.assert_allclose(at[0][1], at[1][1], atol=1e-6)
    mirrored = np.asarray(logits(params, unscaled(images(3, seed=2), t), t))
    assert np.abs(mirrored - at[0]).max() > 1e-3


@pytest.mark.parametrize(("kind", "arch"), [*((kind, "resnet") for kind in KINDS), ("flow", "half_unet")])
def test_gradients_are_finite_at_both_ends_of_time(kind, arch):
    process = make_process(span(kind))
    found, params = made(process, width=4, blocks=(1,), arch=arch)
    params["temperature"] = classifiers.temperatures((0.1, 1.0), (1.0, 2.0))
    t, label = jnp.array([0.0, 1e-6, 0.5, 1.0]), jnp.array([0, 1, 2, 0])
    eps = images(4, seed=3)
    xt = process.corrupt(images(4), eps, t)  # alpha is 0 at t = 1 of vp_cosine and flow
    value, grad = jax.jit(jax.value_and_grad(lambda x: found.log_prob(params, x, t, label).sum()))(xt)
    assert np.isfinite(value) and np.isfinite(grad).all() and all(np.abs(g).max() > 0 for g in grad)


def test_log_prob_and_its_gradient(timed, logits):
    """Sums to one over the labels; the gradient is that of finite differences, with its sign."""
    found, params = timed
    x, t = images(2) * 2, jnp.array([0.4, 0.6])
    log_prob = jax.jit(found.log_prob)
    each = np.stack([np.asarray(log_prob(params, x, t, jnp.full(2, c))) for c in range(3)])
    np.testing.assert_allclose(np.exp(each).sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(each.argmax(0), np.asarray(logits(params, x, t)).argmax(1))
    label = jnp.array([2, 0])
    grad = jax.jit(jax.grad(lambda x: found.log_prob(params, x, t, label).sum()))(x)
    slope = np.sqrt(np.sum(np.asarray(grad, np.float64) ** 2, (1, 2, 3)))
    step = 0.02 * np.asarray(grad) / slope[:, None, None, None]
    ends = [np.asarray(log_prob(params, x + way * step, t, label), np.float64) for way in (1, -1)]
    # A step may cross a kink of a ReLU, so not to all digits.
    np.testing.assert_allclose((ends[0] - ends[1]) / 0.04, slope, rtol=0.1)


def test_unit_scale_of_the_input(timed):
    """Images of standard deviation sigma_data are seen at unit variance at every noise level."""
    found, _ = timed
    x0 = 0.5 * images(4096)
    for level in (0.002, 0.5, 3.0, 80.0):
        t = jnp.full(4096, found.process.time(level))
        seen, _ = found._inputs(found.process.corrupt(x0, images(4096, seed=2), t), t)
        assert np.std(seen) == pytest.approx(1, abs=0.02)


def test_temperature_divides_the_logits_at_its_noise_level(timed, logits):
    found, params = timed
    hot = {**params, "temperature": classifiers.temperatures((0.1, 1.0, 10.0), (1.0, 4.0, 4.0))}
    levels = np.array([0.01, 0.1, 10**-0.5, 1.0, 3.0, 50.0])
    expected = np.array([1.0, 1.0, 2.0, 4.0, 4.0, 4.0])  # ln T half way between ln 1 and ln 4 is ln 2
    t, x = found.process.time(jnp.asarray(levels, jnp.float32)), images(6)
    ratio = np.asarray(logits(params, x, t)) / np.asarray(logits(hot, x, t))
    np.testing.assert_allclose(ratio, np.broadcast_to(expected[:, None], ratio.shape), rtol=1e-4)


def test_one_program_serves_all_classifiers_of_a_shape(timed):
    found, params = timed
    traced = []

    @jax.jit
    def guide(params, x, t, label):
        traced.append(1)
        return jax.grad(lambda x: found.log_prob(params, x, t, label).sum())(x)

    for seed, temperature in ((1, 1.0), (2, 3.0)):
        full = {
            **moved(params, seed),
            "temperature": classifiers.temperatures((0.1, 1.0), (temperature,) * 2),
        }
        guide(full, images(2), jnp.full(2, 0.5), jnp.array([0, 1]))
    assert len(traced) == 1


@pytest.fixture(scope="module")
def batch_normed():
    return made(norm="batch")


def test_batch_norm_sees_the_batch_only_while_training(batch_normed):
    found, params = batch_normed[0], dict(batch_normed[1])
    x, t = images(8), jnp.linspace(0.1, 0.9, 8)
    trained = jax.jit(lambda p, x, t: found.logits(p, x, t, train=True))
    assert np.abs(np.asarray(trained(params, x, t)[:4]) - trained(params, x[:4], t[:4])).max() > 1e-3
    with pytest.raises(ValueError, match="statistics"):
        found.logits(params, x, t)
    params["batch_stats"] = classifiers.pooled([jax.jit(found.moments)(params, x, t)])
    evaluated = jax.jit(found.logits)
    np.testing.assert_allclose(evaluated(params, x, t)[:4], evaluated(params, x[:4], t[:4]), atol=1e-5)
    # With the statistics of that very batch, evaluation is training.
    np.testing.assert_allclose(evaluated(params, x, t), trained(params, x, t), rtol=1e-3, atol=1e-4)


def test_statistics_of_batches_are_those_of_all_images(batch_normed):
    """For the first layer, whose input does not depend on other layers' statistics, by numpy in float64."""
    found, params = batch_normed
    x, t = images(12, seed=4), jnp.linspace(0.1, 0.9, 12)
    moments = jax.jit(found.moments)
    stats = classifiers.pooled([moments(params, x[i : i + 4], t[i : i + 4]) for i in (0, 4, 8)])
    r = np.sqrt(np.asarray(found.process.sigma(t), np.float64) ** 2 + 0.25)[:, None, None, None]
    padded = np.pad(np.asarray(x, np.float64) / r, ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["net"]["conv_in"]["kernel"], np.float64)
    h = sum(padded[:, i : i + 4, j : j + 4] @ kernel[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(stats["norm_in"]["mean"], h.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["norm_in"]["var"], h.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("side_length", [1, 2, 3])
def test_small_maps_are_convolved_as_large_ones(side_length):
    x = images(2, (side_length, side_length, 3))
    layer = classifiers.AnyConv(5)
    params = layer.init(jax.random.key(0), x)
    dimensions = ("NHWC", "HWIO", "NHWC")
    kernel = params["params"]["kernel"]
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions)
    np.testing.assert_allclose(layer.apply(params, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "shape", "classes", "said"),
    [
        ({}, (8, 8, 1), 1, "1 classes.*surrogate.clusters"),
        ({"width": 6}, (8, 8, 1), 3, "classifier.width = 6: .*multiple of 4"),
        ({"blocks": ()}, (8, 8, 1), 3, "classifier.blocks"),
        ({"blocks": (1, 0)}, (8, 8, 1), 3, "classifier.blocks"),
        ({"blocks": (1, 1, 1, 1)}, (28, 28, 1), 3, "multiples of 8.*28x28; give 3 stages or fewer"),
        ({"arch": "half_unet", "norm": "batch"}, (8, 8, 1), 3, "classifier.norm = 'batch'"),
    ],
)
def test_wrong_fields(fields, shape, classes, said):
    with pytest.raises(UserError, match=said) as caught:
        classifiers.make_classifier(side.Classifier(**fields), VE, shape, classes, 0.5)
    assert "\n" not in str(caught.value)
