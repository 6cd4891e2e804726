"""Around the network: preconditioning, what the output stands for, conditions, the learned loss weight."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config
from mdiff.errors import UserError
from mdiff.nets.denoiser import Model, make_model
from mdiff.nets.embeddings import Conditions, LevelUncertainty
from mdiff.process.laws import make_process

KINDS = ("ve", "vp_linear", "vp_cosine", "flow")
SIGMA = np.array([0.05, 0.9, 30.0])
RNG = np.random.default_rng(0)
XT = RNG.normal(size=(3, 4, 4, 2))


class Known(nn.Module):
    """F = 0.3 x - 0.1 x^2 + 0.01 c + mean of the condition: what it was shown can be read off what it says."""

    @nn.compact
    def __call__(self, x, c_noise, cond=None, train=False):
        known = 0.3 * x - 0.1 * x**2 + 0.01 * c_noise[:, None, None, None]
        return known if cond is None else known + cond.mean(-1)[:, None, None, None]


def known_model(kind, prediction="edm"):
    process = make_process(config.Process(kind=kind))
    return Model(Known(), None, process, 0.6, (4, 4, 2), prediction)


def rates(kind, sigma):
    """(t, alpha, sigma(t), alpha', sigma') of the law where sigma / alpha = `sigma`, in float64."""
    if kind == "ve":
        t = (sigma / 80) ** (1 / 7)
        return t, np.ones_like(t), sigma, np.zeros_like(t), 7 * 80 * t**6
    if kind == "flow":
        t = sigma / (1 + sigma)
        return t, 1 - t, t, -np.ones_like(t), np.ones_like(t)
    if kind == "vp_cosine":
        t = np.arctan(sigma) * 2 / np.pi
        a, s = np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
        return t, a, s, -np.pi / 2 * s, np.pi / 2 * a
    rate = np.log1p(sigma**2)  # 0.1 t + 9.95 t^2
    t = (-0.1 + np.sqrt(0.01 + 4 * 9.95 * rate)) / (2 * 9.95)
    a, s = np.exp(-rate / 2), np.sqrt(-np.expm1(-rate))
    a_dot = -a * (0.1 + 19.9 * t) / 2
    return t, a, s, a_dot, -a * a_dot / s


def shaped(*values):
    return [np.asarray(v)[:, None, None, None] for v in values]


@pytest.mark.parametrize("kind", KINDS)
def test_preconditioning_is_edm(kind):
    """D(x) = c_skip x + c_out F(c_in x, ln(sigma)/4) on x = xt / alpha, in float64."""
    t, alpha, *_ = rates(kind, SIGMA)
    s, a = shaped(SIGMA, alpha)
    x, sd = XT / a, 0.6
    c_in, c_noise = 1 / np.sqrt(s**2 + sd**2), np.log(s) / 4
    raw = 0.3 * (c_in * x) - 0.1 * (c_in * x) ** 2 + 0.01 * c_noise
    x0 = sd**2 / (s**2 + sd**2) * x + s * sd / np.sqrt(s**2 + sd**2) * raw
    out = known_model(kind).apply({"net": {}}, jnp.float32(XT), jnp.float32(t))[0]
    np.testing.assert_allclose(out.x0, x0, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(out.eps, (x - x0) / s, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity"])
def test_the_output_is_what_it_is_said_to_be(kind, prediction):
    """The completed prediction is consistent with xt, and its named form is the raw output."""
    t, alpha, sigma, alpha_dot, sigma_dot = rates(kind, SIGMA)
    a, s, a_dot, s_dot = shaped(alpha, sigma, alpha_dot, sigma_dot)
    seen = XT / np.sqrt(1 + s**2) if kind == "ve" else XT
    raw = 0.3 * seen - 0.1 * seen**2 + 0.01 * 1000 * shaped(t)[0]
    x0, eps = known_model(kind, prediction).apply({"net": {}}, jnp.float32(XT), jnp.float32(t))[0]
    x0, eps = np.float64(x0), np.float64(eps)
    largest = np.abs(raw).max()
    np.testing.assert_allclose(a * x0 + s * eps, XT, atol=1e-4 * max(1, largest) * max(1, s.max()))
    said = {"x0": x0, "eps": eps, "v": a * eps - s * x0, "velocity": a_dot * x0 + s_dot * eps}[prediction]
    np.testing.assert_allclose(said, raw, rtol=5e-3, atol=5e-3 * largest)


@pytest.mark.parametrize("prediction", ["edm", "x0", "v", "velocity"])
@pytest.mark.parametrize("kind", ["vp_cosine", "flow"])
def test_both_ends_of_time_are_finite(kind, prediction):
    model = known_model(kind, prediction)

    def total(xt, t):
        return jnp.sum(model.apply({"net": {}}, xt, t)[0].x0)

    for t in (0.0, 1.0):
        out = model.apply({"net": {}}, jnp.float32(XT), jnp.full(3, t))[0]
        assert np.all(np.isfinite(out.x0)) and np.all(np.isfinite(out.eps))
        assert np.all(np.isfinite(jax.grad(total)(jnp.float32(XT), jnp.full(3, t))))


def test_make_model_passes_the_prediction_on():
    cfg = config.Config(net=config.Net(channels=16, prediction="v"), process=config.Process(kind="flow"))
    assert make_model(cfg, 1).prediction == "v"


def conditional(**parts):
    """A model with a condition and no network to compile."""
    module = Conditions(parts.get("classes", 0), parts.get("vector", 0), parts.get("augment", False), 6)
    model = Model(Known(), module, make_process(config.Process()), 0.5, (4, 4, 2))
    return model, model.init(jax.random.key(0))


FULL = {"classes": 3, "vector": 2, "augment": True}
LABEL, VECTOR, AUGMENT = jnp.array([0, 2, 2]), jnp.float32(RNG.normal(size=(3, 2))), jnp.ones((3, 9))


def test_conditions_by_hand():
    model, params = conditional(**FULL)
    p = jax.tree.map(np.float64, params["embedding"])
    cond = model.condition(params, {"label": LABEL, "vector": VECTOR, "augment": AUGMENT, "x": XT})
    expected = p["table"][[0, 2, 2]] * np.sqrt(3)
    expected += VECTOR @ p["vector"]["kernel"] + p["vector"]["bias"] + AUGMENT @ p["augment"]["kernel"]
    np.testing.assert_allclose(cond, expected, rtol=1e-4, atol=1e-5)
    assert cond.dtype == np.float32


def test_a_missing_condition_is_null_and_drop_makes_it_so():
    model, params = conditional(**FULL)
    null = model.condition(params, {}, n=3)
    assert null.shape == (3, 6)
    np.testing.assert_array_equal(null[0], null[1])
    np.testing.assert_allclose(
        null[0], params["embedding"]["table"][3] * 3**0.5 + params["embedding"]["vector_null"], rtol=1e-5
    )
    batch = {"label": LABEL, "vector": VECTOR}
    drop = jnp.array([True, False, True])
    full, dropped = model.condition(params, batch), model.condition(params, batch, drop=drop)
    np.testing.assert_array_equal(dropped[0], null[0])
    np.testing.assert_array_equal(dropped[1], full[1])
    np.testing.assert_array_equal(dropped[2], null[2])
    # An augmentation of zeros is none; it is not dropped, since the image was augmented all the same.
    np.testing.assert_array_equal(model.condition(params, {"augment": jnp.zeros((3, 9))}), null)
    augmented = {**batch, "augment": AUGMENT}
    assert np.abs(model.condition(params, augmented, drop=drop) - dropped)[0].max() > 1e-3
    # Leaving out a part is dropping that part alone.
    label_only = model.condition(params, {"label": LABEL})
    table = np.float64(params["embedding"]["table"])
    np.testing.assert_allclose(label_only - null, (table[[0, 2, 2]] - table[3]) * np.sqrt(3), atol=1e-5)


def test_conditions_and_null_rows_are_learned():
    model, params = conditional(**FULL)

    def total(p, batch, drop):
        return jnp.sum(model.condition(p, batch, n=3, drop=drop) ** 2)

    half = jnp.array([True, False, False])
    gradient = jax.grad(total)(params, {"label": LABEL, "vector": VECTOR}, half)["embedding"]
    rows = np.abs(gradient["table"]).max(axis=1)
    assert np.array_equal(rows > 0, [False, False, True, True])  # example 0 was dropped; label 1 is absent
    assert np.abs(gradient["vector_null"]).max() > 0
    assert np.abs(gradient["vector"]["kernel"]).max() > 0
    assert np.abs(gradient["augment"]["kernel"]).max() == 0


def test_no_condition_is_the_null_condition():
    model, params = conditional(**FULL)
    call = jax.jit(lambda cond: model.apply(params, jnp.float32(XT), jnp.full(3, 0.5), cond)[0].x0)
    np.testing.assert_allclose(call(None), call(model.condition(params, {}, n=3)), atol=1e-5)
    assert np.abs(call(None) - call(model.condition(params, {"label": LABEL}))).max() > 1e-3


def test_unconditional_models_have_no_condition():
    model = known_model("ve")
    assert model.condition({"net": {}}, {"label": LABEL}) is None
    assert model.condition({"net": {}}, {}, n=2, drop=jnp.array([True, False])) is None


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"vector": jnp.ones((3, 5))}, ("vector", "(3, 5)", "net.vector to 5")),
        ({"augment": jnp.ones((3, 6))}, ("augment", "(3, 6)", "[B, 9]")),
        ({}, ("condition", "n")),
    ],
)
def test_bad_conditions_are_named(batch, words):
    model, params = conditional(**FULL)
    with pytest.raises(UserError) as caught:
        model.condition(params, batch)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm", "dit"])
def test_every_architecture_takes_every_condition(arch):
    shape = {} if arch == "dit" else {"mults": (1,), "blocks": 1}
    net = config.Net(arch=arch, channels=16, classes=4, vector=3, **shape)
    cfg = config.Config(
        data=config.Data(size=8, augment=0.1), net=net, loss=config.Loss(level_weight="learned")
    )
    model = make_model(cfg, 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert set(shapes) == {"net", "embedding", "uncertainty"}
    assert shapes["embedding"]["table"].shape[0] == 5
    batch = {"label": jnp.array([1, 3]), "vector": jnp.ones((2, 3)), "augment": jnp.zeros((2, 9))}

    def run(params):
        cond = model.condition(params, batch)
        return model.apply(params, jnp.ones((2, 8, 8, 1)), jnp.full(2, 0.5), cond)[0].x0, cond

    x0, cond = jax.eval_shape(run, shapes)
    assert x0.shape == (2, 8, 8, 1)
    assert cond.shape == (2, {"ncsnpp": 32, "adm": 64}.get(arch, 16))


def test_learned_log_variance_starts_at_zero_and_follows_its_features():
    model = known_model("ve")
    assert model.log_variance({"net": {}}, jnp.ones(2)) is None
    model = Model(Known(), None, model.process, 0.5, (4, 4, 2), "edm", LevelUncertainty(8))
    params = model.init(jax.random.key(0))
    sigma = jnp.float32(SIGMA)
    np.testing.assert_array_equal(model.log_variance(params, sigma), np.zeros(3))
    kernel = RNG.normal(size=(8, 1))
    params["uncertainty"]["map"]["kernel"] = jnp.float32(kernel)
    angle = (
        2 * np.pi * (np.log(SIGMA) / 4)[:, None] * np.float64(params["uncertainty"]["features"]["frequency"])
    )
    expected = np.sqrt(2) * np.concatenate([np.sin(angle), np.cos(angle)], 1) @ kernel
    np.testing.assert_allclose(model.log_variance(params, sigma), expected[:, 0], atol=1e-4)
    gradient = jax.grad(lambda p: model.log_variance(p, sigma).sum())(params)["uncertainty"]
    assert np.abs(gradient["map"]["kernel"]).max() > 0
    assert np.abs(gradient["features"]["frequency"]).max() == 0


def test_yesterdays_parameters_still_load():
    """Names and shapes of an unconditional DDPM++ as they were when the first checkpoints were written."""
    net = config.Net(channels=16, mults=(1, 2), blocks=1, attention=(4,))
    model = make_model(config.Config(data=config.Data(size=8), net=net), 1)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert set(shapes) == {"net"}
    blocks = {
        "enc8_0",
        "enc4_down",
        "enc4_0",
        "mid4_0",
        "mid4_1",
        "dec4_0",
        "dec4_1",
        "dec8_up",
        "dec8_0",
        "dec8_1",
    }
    assert set(shapes["net"]) == blocks | {"emb0_map", "emb1_map", "conv_in", "norm_out", "conv_out"}
    middle = shapes["net"]["mid4_0"]
    assert set(middle) == {"norm0", "conv0", "emb", "norm1", "conv1", "attention"}
    assert {k: v.shape for k, v in middle["emb"]["map"].items()} == {"kernel": (64, 32), "bias": (32,)}
    assert middle["attention"]["qkv"]["map"]["kernel"].shape == (32, 96)
    assert shapes["net"]["enc4_0"]["skip"]["map"]["kernel"].shape == (16, 32)
