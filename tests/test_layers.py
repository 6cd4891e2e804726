"""Layers against scipy, numpy loops in float64, and symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d, upfirdn

from mdiff.nets.embeddings import FourierFeatures, noise_embedding, position_embedding
from mdiff.nets.layers import BIASES, GATES, Attention, conv_scan_safe
from mdiff.nets.resample import BOX, FIR, depth_to_space, downsample, space_to_depth, surround, upsample
from mdiff.trees import map_named

RNG = np.random.default_rng(0)


def arbitrary(module, *inputs):
    """Parameters of a module, drawn with numpy: nothing to compile, and no path is near zero."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return map_named(
        lambda name, s: np.float32(name.endswith("scale") + 0.3 * RNG.normal(size=s.shape)), shapes
    )


def along(x, axis, taps, up, start, count, down):
    """One axis of an image through scipy's upsample-filter-downsample."""
    return np.take(upfirdn(taps, x, up, 1, axis), start + down * np.arange(count), axis)


@pytest.mark.parametrize("taps", [BOX, FIR, (1, 5, 10, 10, 5, 1)])
def test_resampling_is_upfirdn(taps):
    x = RNG.normal(size=(2, 8, 6, 3))
    kernel, margin = np.array(taps) / sum(taps), len(taps) // 2 - 1
    start = len(taps) - 1 - margin
    down = along(along(x, 1, kernel, 1, start, 4, 2), 2, kernel, 1, start, 3, 2)
    up = along(along(x, 1, 2 * kernel, 2, margin, 16, 1), 2, 2 * kernel, 2, margin, 12, 1)
    np.testing.assert_allclose(downsample(jnp.float32(x), taps), down, atol=1e-6)
    np.testing.assert_allclose(upsample(jnp.float32(x), taps), up, atol=1e-6)


def test_upsampling_is_the_transpose_of_downsampling():
    x, y = RNG.normal(size=(1, 8, 8, 2)), RNG.normal(size=(1, 4, 4, 2))
    for taps in (BOX, FIR):
        left = np.sum(np.asarray(downsample(jnp.float32(x), taps)) * y)
        right = np.sum(x * np.asarray(upsample(jnp.float32(y), taps)))
        assert 4 * left == pytest.approx(right, rel=1e-4)


def test_the_pyramid_sees_an_endless_black_plane():
    """Convolve and filter on a large black canvas, then cut the image out: the same as `surround`."""
    x, kernel = RNG.normal(size=(6, 6)), RNG.normal(size=(3, 3))
    canvas = correlate2d(np.pad(x, 7), kernel, mode="same")
    taps = np.outer(FIR, FIR) / 64
    expected = correlate2d(canvas, taps, mode="valid")[6:12:2, 6:12:2]
    from_layers = jax.lax.conv_general_dilated(
        surround(jnp.float32(x)[None, :, :, None]),
        jnp.float32(kernel)[:, :, None, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    out = downsample(from_layers, FIR, pad=False)[0, :, :, 0]
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_space_to_depth_round_trip():
    x = jnp.arange(2 * 8 * 8 * 3, dtype=jnp.float32).reshape(2, 8, 8, 3)
    np.testing.assert_array_equal(depth_to_space(space_to_depth(x, 2), 2), x)
    np.testing.assert_array_equal(space_to_depth(x, 2)[0, 0, 0], x[0, :2, :2].reshape(-1))


def test_scan_safe_convolution_has_the_plain_gradients():
    x, k, dy = (jnp.float32(RNG.normal(size=s)) for s in ((3, 6, 6, 4), (3, 3, 4, 5), (3, 6, 6, 5)))

    def plain(x, k):
        return jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    out, pull = jax.vjp(plain, x, k)
    safe, pull_safe = jax.vjp(conv_scan_safe, x, k)
    np.testing.assert_allclose(out, safe, atol=1e-5)
    for a, b in zip(pull(dy), pull_safe(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def attention_by_loops(qkv, heads, bias, gate, norm=lambda v, which: v):
    """softmax(q k / sqrt(d) + bias) (v gate), one head and one position at a time, in float64."""
    b, n, c3 = qkv.shape
    c, d = c3 // 3, c3 // 3 // heads
    out = np.zeros((b, n, c))
    for i in range(b):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            q, k, v = (qkv[i, :, j * c : (j + 1) * c][:, part] for j in range(3))
            q, k = norm(q, "norm_q"), norm(k, "norm_k")
            for row in range(n):
                logits = np.array([q[row] @ k[col] for col in range(n)]) / np.sqrt(d) + bias[i, h, row]
                weight = np.exp(logits - logits.max())
                out[i, row, part] = (weight / weight.sum()) @ (v * gate[part])
    return out


@pytest.mark.parametrize("heads", [1, 2])
def test_attention_by_loops(heads):
    b, s, c = 2, 3, 8
    module = Attention(head_channels=0 if heads == 1 else c // heads)
    x = RNG.normal(size=(b, s, s, c))
    params = arbitrary(module, jnp.float32(x))
    bias, gate = RNG.normal(size=(b, heads, s * s, s * s)), RNG.normal(size=c)
    out = module.apply(
        {
            "params": params,
            BIASES: {"bias": jnp.float32(bias)},
            GATES: {"value_gate": {"gate": jnp.float32(gate)}},
        },
        jnp.float32(x),
    )
    groups = x.reshape(b, s * s, 2, 4)  # 8 channels: two groups of four
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    normed = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(b, s * s, c)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    qkv = normed @ np.float64(params["qkv"]["map"]["kernel"]) + params["qkv"]["map"]["bias"]
    attended = attention_by_loops(qkv, heads, bias, gate)
    expected = attended @ np.float64(params["out"]["map"]["kernel"]) + params["out"]["map"]["bias"]
    np.testing.assert_allclose(out, x + expected.reshape(x.shape), atol=2e-5)


def test_positions_are_what_sums_of_angles_say():
    """<p(y,x), p(y',x')> depends on the differences alone, is symmetric, and is largest at the same place."""
    height, width, dim = 3, 5, 16
    p = np.asarray(position_embedding(height, width, dim), np.float64).reshape(height, width, dim)
    assert np.unique(p.reshape(-1, dim).round(5), axis=0).shape[0] == height * width
    gram = np.einsum("yxd,vud->yxvu", p, p)
    np.testing.assert_allclose(gram[0, 0, 1, 2], gram[1, 2, 2, 4], atol=1e-6)  # the same step
    np.testing.assert_allclose(gram[0, 2, 1, 0], gram[0, 0, 1, 2], atol=1e-6)  # its mirror image
    np.testing.assert_allclose(np.einsum("yxyx->yx", gram), dim / 2, atol=1e-6)  # sin^2 + cos^2
    # Half of the entries are of the row alone, half of the column; swapping the axes swaps the halves.
    np.testing.assert_array_equal(p[:, 0, : dim // 2], p[:, 3, : dim // 2])
    np.testing.assert_array_equal(p[0, :, dim // 2 :], p[2, :, dim // 2 :])
    turned = np.asarray(position_embedding(width, height, dim)).reshape(width, height, dim).transpose(1, 0, 2)
    np.testing.assert_allclose(turned, np.roll(p, dim // 2, axis=-1), atol=1e-6)


def test_noise_features_by_hand():
    c = np.array([-1.5, 0.0, 250.0])
    frequency = 10_000.0 ** -(np.arange(3) / 2)
    expected = np.concatenate([np.sin(c[:, None] * frequency), np.cos(c[:, None] * frequency)], axis=1)
    np.testing.assert_allclose(noise_embedding(jnp.float32(c), 6), expected, atol=2e-5)


def test_fourier_frequencies_have_their_scale_and_no_gradient():
    module, c = FourierFeatures(4096, scale=16.0), jnp.array([0.3, -1.2])
    params = jax.jit(module.init)(jax.random.key(0), c)
    frequency = np.asarray(params["params"]["frequency"], np.float64)
    assert np.std(frequency) == pytest.approx(16.0, rel=0.05)
    angle = 2 * np.pi * np.array([0.3, -1.2])[:, None] * frequency
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    np.testing.assert_allclose(module.apply(params, c), expected, atol=1e-3)  # float32 angles up to 400
    gradient = jax.grad(lambda p: jnp.sum(module.apply(p, c) ** 3))(params)
    assert np.abs(gradient["params"]["frequency"]).max() == 0
