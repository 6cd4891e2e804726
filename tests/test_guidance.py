"""Guidance against scores of a labelled mixture, and its contracts: calls, interval, identity at weight 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key, keys
from mdiff.nets.denoiser import make_model
from mdiff.process import laws
from mdiff.process.times import make_grid
from mdiff.recipes.generate import conditions, make_generator
from mdiff.sample import guidance, sampler
from mdiff.sample.steps import METHODS
from mdiff.types import Prediction

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
PROCESS = {kind: laws.make_process(config.Process(kind=kind)) for kind in KINDS}
MEANS, PRIOR, STD = np.array([-0.5, 0.7]), np.array([0.35, 0.65]), 0.2
NULL = jnp.zeros((1, 1))  # an embedding of +1 or -1 is a class, 0 stands for "unknown"


def two_classes(process, seen=None):
    """The exact denoiser of a mixture of two normal laws, told the class or not."""

    def denoise(xt, t, cond=None):
        if seen is not None:
            jax.debug.callback(lambda x, c: seen.append((x.shape[0], np.asarray(c))), xt, cond)
        alpha, sigma = (a[:, None, None, None] for a in (process.alpha(t), process.sigma(t)))
        variance = (alpha * STD) ** 2 + sigma**2
        each = [m + alpha * STD**2 / variance * (xt - alpha * m) for m in MEANS]
        fits = [np.log(p) - (xt - alpha * m) ** 2 / (2 * variance) for p, m in zip(PRIOR, MEANS, strict=True)]
        second = jax.nn.sigmoid(fits[1] - fits[0])
        told = cond[:, :, None, None]
        share = jnp.where(told == 0, second, (told > 0).astype(jnp.float32))
        return process.from_x0(xt, (1 - share) * each[0] + share * each[1], t)

    return denoise


def states(kind, level, n=9):
    """n noisy values around the mixture at one noise level, their times, and float64 alpha and sigma."""
    process = PROCESS[kind]
    t = process.time(jnp.float32(level))
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    x = np.linspace(-1.2, 1.2, n) * np.hypot(alpha, sigma)
    return jnp.float32(x).reshape(n, 1, 1, 1), jnp.full((n,), t), x, alpha, sigma


# ----------------------------------------------------------------------------- against the known score


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", [0.0, 0.5, 2.5])
def test_guided_score_is_the_weighted_sum_of_scores(kind, weight):
    process = PROCESS[kind]
    for level, label in ((0.3, 1), (1.0, -1), (6.0, 1)):
        xt, t, x, alpha, sigma = states(kind, level)
        scale, h = np.hypot(alpha * STD, sigma), 1e-5 * np.hypot(alpha, sigma)
        chosen = MEANS[(label + 1) // 2]

        def given(x, alpha=alpha, scale=scale, chosen=chosen):
            return norm.logpdf(x, alpha * chosen, scale)

        def unknown(x, alpha=alpha, scale=scale):
            return np.log(norm.pdf(x[:, None], alpha * MEANS, scale) @ PRIOR)

        slope_given, slope_unknown = ((f(x + h) - f(x - h)) / (2 * h) for f in (given, unknown))
        expected = (1 - weight) * slope_unknown + weight * slope_given
        guided = guidance.classifier_free(two_classes(process), NULL, weight, process)
        prediction = guided(xt, t, jnp.full((len(x), 1), float(label)))
        score = np.asarray(process.score(prediction, t)).ravel()
        np.testing.assert_allclose(score, expected, atol=3e-4 * np.abs(expected).max())
        # x0 and eps still belong to the same xt.
        np.testing.assert_allclose(process.corrupt(*prediction, t), xt, atol=2e-5 * (1 + sigma))


def test_guidance_draws_the_class_and_sharpens():
    """With weight 1 the share of class +1 is that asked for; guided samples move away from the other class."""
    process, n = PROCESS["flow"], 2000
    cfg = config.Sample(steps=12, method="dpmpp2m")
    grid = make_grid(process, "karras", 12, 0.002, 80.0)
    step, cond = METHODS["dpmpp2m"](process, cfg), jnp.ones((n, 1))

    @jax.jit
    def draw(weight):
        def blend(xt, t, cond):
            null = jnp.zeros_like(cond)
            return guidance.extrapolate(
                two_classes(process)(xt, t, null), two_classes(process)(xt, t, cond), weight
            )

        return sampler.integrate(
            process, blend, step, grid, keys(0, "sample", jnp.arange(n)), (1, 1, 1), cond
        )

    unconditional, plain, strong = (np.asarray(draw(weight)).ravel() for weight in (0.0, 1.0, 3.0))
    assert np.mean(unconditional > 0.1) == pytest.approx(PRIOR[1], abs=0.05)
    assert plain.mean() == pytest.approx(MEANS[1], abs=0.02)
    assert strong.mean() > plain.mean() + 0.02


# ------------------------------------------------------------------------------------------- contracts


def test_weight_1_is_the_denoiser_itself():
    denoiser = two_classes(PROCESS["ve"])
    assert guidance.classifier_free(denoiser, NULL, 1.0, PROCESS["ve"], 0.1, 2.0) is denoiser
    assert guidance.classifier_free(denoiser, None, 1, PROCESS["ve"]) is denoiser


def test_both_halves_are_one_call():
    seen = []
    guided = guidance.classifier_free(two_classes(PROCESS["ve"], seen), NULL, 2.0, PROCESS["ve"])
    xt, t, *_ = states("ve", 1.0, 5)
    jax.block_until_ready(jax.jit(guided)(xt, t, jnp.ones((5, 1))))
    jax.effects_barrier()
    assert [n for n, _ in seen] == [10]
    np.testing.assert_array_equal(seen[0][1].ravel(), [1.0, 0.0] * 5)


def test_a_null_per_image_is_that_images():
    process = PROCESS["vp_cosine"]
    xt, t, *_ = states("vp_cosine", 1.0, 4)
    null = jnp.float32([[0.0], [-1.0], [0.0], [-1.0]])
    cond = jnp.ones((4, 1))
    made = guidance.classifier_free(two_classes(process), null, 2.0, process)(xt, t, cond)
    for i in range(4):
        alone = guidance.classifier_free(two_classes(process), null[i : i + 1], 2.0, process)
        np.testing.assert_allclose(made.x0[i], alone(xt[i : i + 1], t[:1], cond[:1]).x0[0], atol=1e-5)


def test_outside_the_interval_the_prediction_is_conditional():
    process, seen = PROCESS["flow"], []
    denoiser = two_classes(process, seen)
    inside = jax.jit(guidance.classifier_free(denoiser, NULL, 2.0, process, 0.5, 2.0))
    everywhere = jax.jit(guidance.classifier_free(denoiser, NULL, 2.0, process))
    cond = jnp.ones((9, 1))
    for level, guided in (
        (0.1, False),
        (0.49, False),
        (0.51, True),
        (1.99, True),
        (2.01, False),
        (40.0, False),
    ):
        xt, t, *_ = states("flow", level)
        seen.clear()
        made = jax.block_until_ready(inside(xt, t, cond))
        jax.effects_barrier()
        assert [n for n, _ in seen] == [18 if guided else 9], level  # outside, only half is computed
        expected = everywhere(xt, t, cond) if guided else denoiser(xt, t, cond)
        np.testing.assert_allclose(made.x0, expected.x0, atol=1e-5)


def test_each_image_has_its_own_noise_level():
    process = PROCESS["ve"]
    guided = guidance.classifier_free(two_classes(process), NULL, 3.0, process, 0.5, 2.0)
    everywhere = guidance.classifier_free(two_classes(process), NULL, 3.0, process)
    t = process.time(jnp.float32([0.1, 1.0, 10.0]))
    xt, cond = jnp.float32([0.2, 0.1, 3.0]).reshape(3, 1, 1, 1), jnp.ones((3, 1))
    made, plain = guided(xt, t, cond).x0, two_classes(process)(xt, t, cond).x0
    np.testing.assert_allclose(made[jnp.array([0, 2])], plain[jnp.array([0, 2])], atol=1e-5)
    np.testing.assert_allclose(made[1], everywhere(xt, t, cond).x0[1], atol=1e-6)
    assert abs(float((made[1] - plain[1]).squeeze())) > 1e-2


def test_the_docstrings_building_block():
    away, towards = (
        Prediction(jnp.full((1, 1, 1, 1), a), jnp.full((1, 1, 1, 1), b)) for a, b in ((1, 4), (2, 2))
    )
    made = guidance.extrapolate(away, towards, 3.0)
    assert (float(made.x0.squeeze()), float(made.eps.squeeze())) == (4.0, -2.0)


def test_missing_conditions_are_named():
    process = PROCESS["ve"]
    with pytest.raises(UserError, match=r"sample.guidance = 2.0: the model has no condition"):
        guidance.classifier_free(two_classes(process), None, 2.0, process)
    xt, t, *_ = states("ve", 1.0)
    with pytest.raises(UserError, match=r"sample.guidance = 2.0: needs a condition"):
        guidance.classifier_free(two_classes(process), NULL, 2.0, process)(xt, t, None)


@pytest.mark.parametrize(
    ("fields", "net", "words"),
    [
        ({"guidance": 2.0}, {}, "no condition to guide by"),
        ({"guidance": 2.0}, {"classes": 10}, "net.condition_dropout = 0"),
        ({"guidance": -1.0}, {"classes": 10}, "sample.guidance = -1.0"),
        ({"guidance": float("nan")}, {"classes": 10}, "sample.guidance = nan"),
        (
            {"guidance": 2.0, "guidance_min": 3.0, "guidance_max": 3.0},
            {"classes": 10},
            "guidance_min < guidance_max",
        ),
        ({"guidance_max": 3.0}, {"classes": 10}, "sample.guidance_max = 3.0: has no effect"),
    ],
)
def test_bad_fields_are_named(fields, net, words):
    with pytest.raises(UserError) as caught:
        guidance.check(config.Sample(**fields), config.Net(**net))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_trained_for_guidance_passes():
    trained = config.Net(classes=10, condition_dropout=0.1)
    guidance.check(config.Sample(guidance=2.0, guidance_min=0.1, guidance_max=5.0), trained)
    guidance.check(config.Sample(), config.Net())


# ------------------------------------------------------------------------------------- with a network


def test_generator_guides_a_labelled_network():
    net = config.Net(channels=16, mults=(1,), blocks=1, attention=(), classes=3, condition_dropout=0.1)
    model = make_model(config.Config(data=config.Data(size=8), net=net), 1)
    rng = np.random.default_rng(0)  # any parameters do, if every path is active
    params = jax.tree.map(
        lambda leaf: jnp.float32(0.2 * rng.normal(size=leaf.shape)),
        jax.eval_shape(lambda: model.init(key(0, "init"))),
    )

    def generate(**fields):
        cfg = config.Sample(steps=2, method="euler", **fields)
        return np.asarray(make_generator(model, cfg)(params, jnp.arange(3)))

    plain, doubled = generate(), generate(guidance=2.0)
    assert np.abs(plain - doubled).max() > 1e-3
    # An interval without any noise level of the grid leaves every sample conditional.
    np.testing.assert_allclose(generate(guidance=2.0, guidance_min=90.0, guidance_max=99.0), plain, atol=1e-4)
    cond = conditions(model, params, jnp.arange(4))
    np.testing.assert_array_equal(cond[0], cond[3])  # classes in turn
    assert np.abs(np.asarray(cond[0] - cond[1])).max() > 1e-3
