"""The network against published sizes, and its contracts: gates, taps, biases, preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdiff import config
from mdiff.errors import UserError
from mdiff.keys import key
from mdiff.nets.denoiser import make_model
from mdiff.nets.layers import conv_scan_safe, depth_to_space, space_to_depth
from mdiff.trees import named_leaves, size


def model_of(image_size=16, image_channels=1, **net):
    cfg = config.Config(data=config.Data(size=image_size), net=config.Net(**net))
    return make_model(cfg, image_channels)


SMALL = {"channels": 16, "mults": (1, 2), "blocks": 1, "attention": (8,), "patch": 1}


def perturbed(params, scale=0.2):
    """Parameters with the near-zero initial layers made active, so that every path matters."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return tree.unflatten([leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def small():
    model = model_of(**SMALL)
    return model, perturbed(jax.jit(model.init)(key(0, "init")))


@pytest.mark.parametrize(
    ("size_px", "net", "millions"),
    [
        (32, {"channels": 128, "mults": (2, 2, 2), "blocks": 4, "attention": (16,)}, 55.73),
        (64, {"channels": 128, "mults": (1, 2, 2, 2), "blocks": 4, "attention": (16,)}, 61.80),
    ],
)
def test_ddpmpp_has_the_published_size(size_px, net, millions):
    model = model_of(size_px, 3, **net)
    count = size(jax.eval_shape(lambda: model.init(key(0, "init"))))
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_gates_of_one_change_nothing_and_zero_silences(small):
    model, params = small
    xt, t = jax.random.normal(key(0, "x"), (2, 16, 16, 1)), jnp.array([0.4, 0.7])
    gates = model.gates()
    run = jax.jit(lambda g: model.denoiser(params, g)(xt, t, None).x0)
    plain = run(None)
    np.testing.assert_allclose(run(gates), plain, atol=1e-5)
    for name, _ in named_leaves(gates):
        # One neuron off: the output must move, whichever layer it is in.
        off = jax.tree_util.tree_map_with_path(
            lambda path, g, name=name: (
                g.at[0].set(0.0) if jax.tree_util.keystr(path, simple=True, separator="/") == name else g
            ),
            gates,
        )
        assert np.abs(run(off) - plain).max() > 1e-4, name


def test_gates_may_differ_per_example(small):
    model, params = small
    xt, t = jax.random.normal(key(0, "x"), (2, 16, 16, 1)), jnp.array([0.5, 0.5])
    gates = model.gates()
    plain = model.denoiser(params, gates)(xt, t, None).x0
    where = gates["mid8_0"]["out_gate"]["gate"]
    gates["mid8_0"]["out_gate"]["gate"] = jnp.stack([where, where * 0])[:, None, None, :]
    both = model.denoiser(params, gates)(xt, t, None).x0
    np.testing.assert_allclose(both[0], plain[0], atol=1e-5)
    assert np.abs(both[1] - plain[1]).max() > 1e-3


def test_taps_return_named_activations_only_on_request(small):
    model, params = small
    xt, t = jnp.ones((2, 16, 16, 1)), jnp.array([0.5, 0.6])
    _, nothing = model.apply(params, xt, t)
    assert nothing == {}
    _, tapped = model.apply(params, xt, t, taps=("*/attention/map", "mid8_0/hidden"))
    assert tapped["mid8_0/hidden"].shape == (2, 8, 8, 32)
    maps = tapped["mid8_0/attention/map"]
    np.testing.assert_allclose(maps.sum(-1), 1.0, rtol=1e-5)


def test_attention_bias_masks_a_position(small):
    model, params = small
    xt, t = jax.random.normal(key(0, "x"), (1, 16, 16, 1)), jnp.array([0.5])
    bias = {"mid8_0": {"attention": {"bias": jnp.zeros((64, 64)).at[:, 3].set(-1e9)}}}
    _, tapped = model.apply(params, xt, t, attn_bias=bias, taps=("mid8_0/attention/map",))
    assert float(tapped["mid8_0/attention/map"][..., 3].max()) == 0.0


def test_absent_gates_and_taps_cost_nothing(small):
    """The program without gates and taps holds neither: fewer multiplications and fewer outputs."""
    model, params = small
    inputs = jnp.ones((2, 16, 16, 1)), jnp.array([0.5, 0.6])

    def text(fn):
        return jax.jit(fn).lower(*inputs).as_text()

    plain = text(lambda x, t: model.apply(params, x, t)[0].x0)
    tapped = text(lambda x, t: model.apply(params, x, t, taps=("*",))[0].x0)
    gated = text(lambda x, t: model.apply(params, x, t, gates=model.gates())[0].x0)
    assert tapped == plain  # taps nobody reads leave no trace
    count = len(jax.tree.leaves(model.gates()))
    assert gated.count("stablehlo.multiply") == plain.count("stablehlo.multiply") + count


def test_preconditioning_is_edm(small):
    """D = c_skip x + c_out F(c_in x, ln(sigma)/4), by hand in float64 around the raw network."""
    model, params = small
    sigma, sd = np.array([0.05, 3.0]), 0.5
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 1))
    c_in = 1 / np.sqrt(sigma**2 + sd**2)
    raw = model.net.apply(
        {"params": params["net"]},
        jnp.float32(x * c_in[:, None, None, None]),
        jnp.float32(np.log(sigma) / 4),
    )
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / np.sqrt(sigma**2 + sd**2)
    expected = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * np.asarray(raw, np.float64)
    t = model.process.time(jnp.float32(sigma))
    np.testing.assert_allclose(model.denoiser(params)(jnp.float32(x), t, None).x0, expected, atol=2e-4)


def test_labels_change_the_prediction():
    model = model_of(channels=16, mults=(1,), blocks=1, attention=(), patch=4, classes=3)
    params = perturbed(jax.jit(model.init)(key(0, "init")))
    xt, t = jnp.ones((2, 16, 16, 1)), jnp.array([0.5, 0.5])
    cond = model.embed(params, jnp.array([0, 2]))
    assert cond.shape == (2, 16)

    @jax.jit
    def out_and_gradient(cond):
        out, pull = jax.vjp(lambda c: model.denoiser(params)(xt, t, c).x0, cond)
        return out, pull(jnp.ones_like(out))[0]

    out, gradient = out_and_gradient(cond)
    assert np.abs(out[0] - out[1]).max() > 1e-4
    assert np.abs(gradient).max() > 0  # the condition can be differentiated


def test_scan_safe_convolution_has_the_plain_gradients():
    rng = np.random.default_rng(0)
    x, k, dy = (jnp.float32(rng.normal(size=s)) for s in ((3, 6, 6, 4), (3, 3, 4, 5), (3, 6, 6, 5)))

    def plain(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    out, pull = jax.vjp(plain, x, k)
    safe, pull_safe = jax.vjp(conv_scan_safe, x, k)
    np.testing.assert_allclose(out, safe, atol=1e-5)
    for a, b in zip(pull(dy), pull_safe(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_space_to_depth_round_trip():
    x = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(depth_to_space(space_to_depth(x, 2), 2), x)
    np.testing.assert_array_equal(space_to_depth(x, 2)[0, 0, 0], x[0, :2, :2].reshape(-1))


@pytest.mark.parametrize(
    ("net", "image_size", "words"),
    [
        ({"mults": (1, 2, 2)}, 18, ("data.size = 18", "multiple of 4", "16")),
        ({"channels": 6}, 16, ("net.channels = 6", "multiple of 4")),
        ({"mults": ()}, 16, ("net.mults",)),
        ({"dropout": 1.0}, 16, ("net.dropout = 1.0",)),
        ({"sigma_data": 0.0}, 16, ("net.sigma_data = 0.0",)),
    ],
)
def test_bad_networks_are_named(net, image_size, words):
    with pytest.raises(UserError) as caught:
        model_of(image_size, **{"channels": 16, **net})
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
